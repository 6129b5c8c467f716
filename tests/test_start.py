"""infra/start.sh: the line that it hands to Ray, and what it refuses; with a `ray` that only tells what it is given."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hosts import shipped

SCRIPT = Path(__file__).parent.parent / "infra" / "start.sh"
TOLD = '#!/bin/sh\necho "$@" >&3\nenv\n'
HEAD = (
    "start --head --port=6379 --dashboard-host=127.0.0.1 --dashboard-port=8265 --ray-client-server-port=10001 "
    "--node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 "
    "--dashboard-agent-grpc-port=6383 --dashboard-agent-listen-port=52365 --metrics-export-port=8080 "
    "--min-worker-port=10002 --max-worker-port=10999"
)
WORKER = HEAD.replace(HEAD[6 : HEAD.index("--node-manager")], "--address=head:6379 ")


@pytest.fixture
def node(tmp_path: Path):
    """Starts start.sh with a good token, changed: environment ("" unsets), mode and text of the token's file."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text(TOLD)
    (tmp_path / "bin" / "ray").chmod(0o755)
    token = tmp_path / "token"

    def start(words: Sequence[str], mode: int = 0o600, text: str = "f" * 64 + "\n", **changes: str):
        token.write_text(text)
        token.chmod(mode)
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        asked = {"PATH": path, "RAY_AUTH_TOKEN_PATH": str(token), **changes}
        environment = {name: value for name, value in asked.items() if value}
        command = ["bash", "-c", f'exec "$0" "$@" 3>{tmp_path / "line"}', str(SCRIPT), *words]
        (tmp_path / "line").unlink(missing_ok=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, (tmp_path / "line").read_text().strip()

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
        (["head"], {"mode": 0o644}, "RAY_AUTH_TOKEN_PATH is TOKEN, of mode 644, which lets others read the token;"),
        (["head"], {"mode": 0o640}, "RAY_AUTH_TOKEN_PATH is TOKEN, of mode 640"),
        (["worker", "head:6379"], {"mode": 0o602}, "RAY_AUTH_TOKEN_PATH is TOKEN, of mode 602"),
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
