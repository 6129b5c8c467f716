"""infra/start.sh: the line that it hands to Ray, and what it refuses; with a `ray` that only tells what it is given."""

import os
import re
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hosts import shipped

SCRIPT = Path(__file__).parent.parent / "infra" / "start.sh"
OWN = f"skiplane-{os.geteuid()}"  # where Ray's sessions lie
TOLD = '#!/bin/sh\necho "$@" >&3\nenv\n'
HEAD = (
    "start --head --port=6379 --dashboard-host=127.0.0.1 --dashboard-port=8265 --ray-client-server-port=10001 "
    f"--temp-dir=TMP/{OWN}/node "
    "--node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 "
    "--dashboard-agent-grpc-port=6383 --dashboard-agent-listen-port=52365 --metrics-export-port=8080 "
    "--min-worker-port=10002 --max-worker-port=10999"
)
WORKER = HEAD.replace(HEAD[6 : HEAD.index("--temp-dir")], "--address=head:6379 ")


@pytest.fixture
def node(tmp_path: Path):
    """Starts start.sh with a good token, a home and a folder for sessions, changed: environment ("" unsets), mode and
    text of the token's file. What ray is told has TMP for that folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text(TOLD)
    (tmp_path / "bin" / "ray").chmod(0o755)
    token = tmp_path / "token"

    def start(words: Sequence[str], mode: int = 0o600, text: str = "f" * 64 + "\n", **changes: str):
        token.write_text(text)
        token.chmod(mode)
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        places = {"HOME": str(tmp_path / "home"), "RAY_TMPDIR": str(tmp_path)}
        asked = {"PATH": path, "RAY_AUTH_TOKEN_PATH": str(token), **places, **changes}
        environment = {name: value for name, value in asked.items() if value}
        command = ["bash", "-c", f'exec "$0" "$@" 3>{tmp_path / "line"}', str(SCRIPT), *words]
        (tmp_path / "line").unlink(missing_ok=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, (tmp_path / "line").read_text().strip().replace(str(tmp_path), "TMP")

    return start


def environment(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


# -- what it starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["head"], HEAD),
        (["head", "--block", "--num-cpus=0"], f"{HEAD} --block --num-cpus=0"),
        (["head", "--dashboard-host", "0.0.0.0"], f"{HEAD} --dashboard-host 0.0.0.0"),  # there is a token
        (["worker", "head:6379"], WORKER),
        (["worker", "head:6379", '--resources={"driver": 1}'], f'{WORKER} --resources={{"driver": 1}}'),
        (["worker", "[fd00::1]:6379"], WORKER.replace("head:6379", "[fd00::1]:6379")),
    ],
)
def test_a_node(node, words: list[str], line: str) -> None:
    done, told = node(words)
    assert (done.returncode, done.stderr, told) == (0, "", line)
    assert shipped().items() <= environment(done).items()
    assert shipped()["RAY_AUTH_MODE"] == "token"


def test_what_the_environment_says_wins_over_ray_env(node) -> None:
    """Quotes, blanks and all."""
    done, _ = node(["head"], RAY_health_check_timeout_ms="9000", OTHER="a 'b' \"declare -x c\" $d")
    found = environment(done)
    assert (found["RAY_health_check_timeout_ms"], found["OTHER"]) == ("9000", "a 'b' \"declare -x c\" $d")
    assert found["RAY_health_check_period_ms"] == shipped()["RAY_health_check_period_ms"]


def test_keys_come_from_a_private_file_and_what_was_set_before_wins(node, tmp_path: Path) -> None:
    for folder in ("home/.skiplane", "other"):
        (tmp_path / folder).mkdir(parents=True)
    for file, text in {"home/.skiplane/secrets.env": "KEY='a b'\nURI=file\n", "other/keys": "KEY=other\n"}.items():
        (tmp_path / file).write_text(text)
        (tmp_path / file).chmod(0o600)
    found = environment(node(["head"], URI="set")[0])
    assert (found["KEY"], found["URI"]) == ("a b", "set")
    found = environment(node(["worker", "head:6379"], SKIPLANE_SECRETS=str(tmp_path / "other/keys"))[0])
    assert (found["KEY"], found.get("URI")) == ("other", None)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_keys_that_others_can_read_are_refused(node, tmp_path: Path, mode: int) -> None:
    (tmp_path / "home/.skiplane").mkdir(parents=True)
    (file := tmp_path / "home/.skiplane/secrets.env").write_text("KEY=a\n")
    file.chmod(mode)
    done, told = node(["head"])
    assert (done.returncode, told) == (2, "")
    assert done.stderr == (
        f"error: SKIPLANE_SECRETS is {file}, of mode {mode:o}, which lets others read what is secret; chmod 600 it, "
        f"and make it anew if others were here\n"
    )


@pytest.mark.parametrize("again", [False, True])
def test_sessions_lie_in_a_folder_of_this_user_alone(node, tmp_path: Path, again: bool) -> None:
    for _ in range(1 + again):
        assert node(["head"])[0].returncode == 0
    found = (tmp_path / OWN).lstat()
    assert (stat.S_ISDIR(found.st_mode), stat.S_IMODE(found.st_mode)) == (True, 0o700)


def test_who_watches_is_told_where_ray_keeps_the_list_of_its_nodes() -> None:
    page = (SCRIPT.parent / "observability" / "README.md").read_text()
    [place] = re.findall("--temp-dir=TMP/(\\S+)", HEAD)
    assert f"`/tmp/{place.replace(OWN, 'skiplane-UID')}/prom_metrics_service_discovery.json`" in page


@pytest.mark.parametrize("temp", [["--temp-dir=/a/b"], ["--temp-dir", "/a/b"]])
def test_a_folder_that_is_given_is_taken(node, tmp_path: Path, temp: list[str]) -> None:
    done, told = node(["head", *temp])
    assert (done.returncode, told) == (0, f"{HEAD} {' '.join(temp)}".replace(f" --temp-dir=TMP/{OWN}/node", "", 1))
    assert not (tmp_path / OWN).exists()


def _loose(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def _anothers(path: Path) -> None:
    path.mkdir(0o700)
    os.chown(path, 65534, 65534)


def _elsewhere(path: Path) -> None:
    path.with_name("elsewhere").mkdir(0o700)
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "make",
    [
        _loose,
        _elsewhere,
        Path.touch,
        pytest.param(_anothers, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")),
    ],
)
def test_a_folder_that_somebody_else_made_is_refused(node, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / OWN)
    done, told = node(["head"])
    assert (done.returncode, told) == (2, "")
    assert re.fullmatch(rf"error: {tmp_path / OWN} is where Ray's sessions would lie, and it is not .*\n", done.stderr)


@pytest.mark.parametrize("changes", [{"text": "short"}, {"RAY_AUTH_TOKEN_PATH": ""}, {"RAY_AUTH_MODE": "disabled"}])
@pytest.mark.parametrize("words", [["head", "--insecure", "--num-cpus=1"], ["worker", "head:6379", "--insecure"]])
def test_insecure_starts_without_a_token_and_says_what_that_means(node, words: list[str], changes) -> None:
    done, told = node(words, **changes)
    assert done.returncode == 0
    assert "--insecure" not in told
    assert environment(done)["RAY_AUTH_MODE"] == "disabled"
    assert re.fullmatch(r"warning: --insecure: this node asks nobody for a token; whoever reaches .*\n", done.stderr)


# A name that Ray's own parser does not know, or a value that is none of its type, makes it raise.
def test_ray_knows_every_option_and_takes_the_last(node) -> None:
    from ray.scripts.scripts import start

    _, told = node(["head", "--metrics-export-port=8081"])
    asked = start.make_context("ray", told.split()[1:]).params
    assert (asked["head"], asked["port"], asked["metrics_export_port"]) == (True, 6379, 8081)
    assert (asked["dashboard_agent_listen_port"], asked["max_worker_port"]) == (52365, 10999)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ([], {}, "'' is no role; it is infra/start.sh head, or infra/start.sh worker HOST:6379"),
        (["--head"], {}, "'--head' is no role"),
        (["worker"], {}, "worker needs the head's address, not ''"),
        (["worker", "--block"], {}, "worker needs the head's address, not '--block'"),
        (["worker", "head"], {}, "worker needs the head's address, not 'head'"),
        (["worker", "http://head:6379"], {}, "worker needs the head's address, not 'http://head:6379'"),
        (["head"], {"PATH": "/usr/bin:/bin"}, "ray is not on PATH"),
        (["head"], {"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled'; it must be token"),
        (["head"], {"RAY_AUTH_TOKEN": "f" * 64}, "RAY_AUTH_TOKEN is set, and every process on this node could read"),
        (["head"], {"RAY_AUTH_TOKEN_PATH": ""}, "RAY_AUTH_TOKEN_PATH is not set; name the file"),
        (["head"], {"RAY_AUTH_TOKEN_PATH": "/no/such"}, "RAY_AUTH_TOKEN_PATH is /no/such, which cannot be read"),
        (["head"], {"RAY_AUTH_TOKEN_PATH": "/"}, "RAY_AUTH_TOKEN_PATH is /, which cannot be read"),
        (["head"], {"text": ""}, "RAY_AUTH_TOKEN_PATH is TOKEN, which holds 0 characters; a token has 32 or more"),
        (["head"], {"text": " \n"}, "RAY_AUTH_TOKEN_PATH is TOKEN, which holds 0 characters"),
        (["head"], {"text": "f" * 31 + "\n"}, "RAY_AUTH_TOKEN_PATH is TOKEN, which holds 31 characters"),
        (
            ["head"],
            {"mode": 0o644},
            "RAY_AUTH_TOKEN_PATH is TOKEN, of mode 644, which lets others read what is secret;",
        ),
        (["head"], {"mode": 0o640}, "RAY_AUTH_TOKEN_PATH is TOKEN, of mode 640"),
        (["worker", "head:6379"], {"mode": 0o602}, "RAY_AUTH_TOKEN_PATH is TOKEN, of mode 602"),
        (["head"], {"SKIPLANE_SECRETS": "/no/such"}, "SKIPLANE_SECRETS is /no/such, which cannot be read"),
        (["head"], {"RAY_TMPDIR": "/no/such"}, f"/no/such/{OWN} is where Ray's sessions would lie, and it is not"),
        *(
            (["head", "--insecure", *host], {}, f"--dashboard-host is {host[-1].partition('=')[2] or host[-1]} and")
            for host in (["--dashboard-host=0.0.0.0"], ["--dashboard-host", "10.0.0.7"], ["--dashboard-host=127.evil"])
        ),
    ],
)
def test_it_refuses_in_a_sentence_and_starts_nothing(node, tmp_path: Path, words, changes, said: str) -> None:
    done, told = node(words, **changes)
    assert (done.returncode, done.stdout, told) == (2, "", "")
    assert re.fullmatch(rf"error: {re.escape(said.replace('TOKEN,', f'{tmp_path}/token,'))}[^\n]*\n", done.stderr)
