"""`jobs.submit`: what is refused before anything is sent, and real jobs on a real cluster."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from jobs import submit
from orchestrator.cluster import gate, local, processes, services
from orchestrator.cluster import jobs as door
from orchestrator.cluster.jobs import Job
from pipelines.errors import ConfigError
from tests import scrape
from tests.dashboard import SECRET, Cluster

ROOT = Path(__file__).parent.parent
TRAIN = ("python", "-m", "jobs.train", "--recipe", "digits", "--name", "a")


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """The environment of a user who may submit."""
    token_file = tmp_path / "token"
    services.create_private(token_file, SECRET)
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file))
    monkeypatch.setenv("SKIPLANE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    return monkeypatch


@pytest.fixture
def cluster(shell, monkeypatch) -> Cluster:
    """The command finds this one behind the door, and may enter."""
    found = Cluster()
    monkeypatch.setattr(door, "Jobs", lambda *_: found)
    monkeypatch.setattr(door, "pack", lambda folder, excludes, file: file.write_bytes(b"zip"))
    monkeypatch.setattr(gate, "ask", lambda *_: "")
    return found


def test_no_follow(cluster, capsys):
    assert submit.main(["--address", "http://h:1", "--no-follow", "--env", "A=1", "--", *TRAIN]) == 0
    out = capsys.readouterr().out
    assert "  to follow it  python -m jobs.submit --address http://h:1 --follow a\n" in out
    assert "  to stop it    ray job stop --address http://h:1 a\n" in out
    [(id, entry, _, env_vars, rest, metadata, resources)] = cluster.submitted
    assert (id, entry, rest, resources) == ("a", " ".join(TRAIN), {}, {})
    assert env_vars == {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30", "A": "1"}
    assert metadata["run"] == "a"
    assert {"user", "run"} <= set(metadata) <= {"user", "run", "git_commit", "git_dirty"}
    assert SECRET not in json.dumps([out, env_vars, metadata])


def test_an_id_of_ones_own(cluster):
    assert submit.main(["--id", "b", "--no-follow", "--resources", '{"driver": 1}', "--", *TRAIN]) == 0
    [(id, *_, metadata, resources)] = cluster.submitted
    assert (id, metadata["run"], resources) == ("b", "a", {"driver": 1})


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143)])
def test_ctrl_c_leaves_the_job_alone(cluster, capsys, stop, code):
    cluster.tails = iter([["a line\nhalf a li", stop]])
    assert submit.main(["--", *TRAIN]) == code
    end = "half a li\njob a goes on without this command\n  to follow it  python -m jobs.submit --follow a\n"
    assert end in capsys.readouterr().out


def test_ctrl_c_while_the_job_is_sent_tells_how_to_find_it(cluster, capsys):
    def send(*_):
        raise KeyboardInterrupt  # the job may be there, and its answer on the way

    cluster.submit = send
    assert submit.main(["--", *TRAIN]) == 130
    end = "job a may have been taken, and goes on then\n  to follow it  python -m jobs.submit --follow a\n"
    assert end in capsys.readouterr().out


def test_follow_a_job_that_is_there(cluster, capsys):
    cluster.tails, cluster.ends = iter([["x\n"]]), iter([Job("a", "RUNNING"), Job("a", "FAILED", exit_code=3)])
    assert submit.main(["--follow", "a"]) == 3
    assert capsys.readouterr().out == "x\njob a: it ended with exit code 3\n"
    assert not cluster.submitted


def test_follow_a_job_that_is_not_there(cluster):
    cluster.ends, cluster.known = iter([None]), [Job(id, "FAILED") for id in "bcdefg"]
    with pytest.raises(
        ConfigError, match=r"--follow is a, and the cluster at http://c has no such job; it has b, c, d, e, f$"
    ):
        submit.main(["--follow", "a"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--", "ls"], "the command is 'ls'"),
        ([], "there is no command"),
        (["--retries", "-1", "--", *TRAIN], "--retries: it is '-1'; a whole number is needed"),
        (["--wait-seconds", "x", "--", *TRAIN], "--wait-seconds: it is 'x'"),
        (["--env", "KEY=1", "--", *TRAIN], "--env KEY looks like a secret"),
        (["--runtime-env", "/none", "--", *TRAIN], "--runtime-env /none cannot be read"),
        (["--runtime-env", "pip-and-conda.yaml", "--", *TRAIN], "pip-and-conda.yaml: Ray does not take it"),
        (["--resources", "1", "--", *TRAIN], "--resources is '1'"),
        (["--address", "h:8265", "--", *TRAIN], "--address is 'h:8265'"),
        (["--follow", "a", "--", *TRAIN], "--follow shows a job that was submitted before"),
        (["--follow", "a", "--no-follow"], "--follow shows a job that was submitted before"),
        (["--recipe", "digits", "--", *TRAIN], "recipe: no such setting"),
    ],
)
def test_settings_that_are_refused_before_anybody_is_asked(cluster, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    Path("pip-and-conda.yaml").write_text("{pip: [a], conda: {dependencies: [b]}}")
    asked = []
    monkeypatch.setattr(gate, "ask", lambda *_: asked.append(1))
    with pytest.raises(ConfigError, match=re.escape(words)):
        submit.main(argv)
    assert (asked, cluster.submitted) == ([], [])


def test_no_token_is_refused_before_anybody_is_asked(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(gate, "ask", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is 'disabled'"):
        submit.main(["--", *TRAIN])


def test_a_repository_that_is_too_large(cluster, monkeypatch):
    monkeypatch.setattr(submit, "PACKAGE_BYTES", 2)
    with pytest.raises(ConfigError, match="the repository packs into 0 MB, and Ray takes 0; name what is no code in"):
        submit.main(["--", *TRAIN])
    assert not cluster.submitted


# -- real jobs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Path]:
    """The home of a one-machine cluster, without MLflow, whose `ray start` says nothing of how jobs are stopped."""
    home = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "NAMES", {"ray": "Ray"})
        patch.setitem(services.RAY_SETTINGS, *scrape.OFTEN)
        for name in ("RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"):
            patch.delitem(services.RAY_SETTINGS, name, raising=False)
            patch.delenv(name, raising=False)
        ports = iter(free_ports(3))
        local.up(home, {name: next(ports) for name in services.DEFAULT_PORTS}, print)
        yield home
        local.down(home, print)


def free_ports(count: int) -> list[int]:
    """Ports that are free now; they differ, as good as surely."""
    return [processes.free_port() for _ in range(count)]


@pytest.fixture
def in_shell(real, home):
    """Starts a command as in a shell that has read env.sh, its output in one pipe."""
    cluster, started = local.load(real), []
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(real / "local" / "token"), "PYTHONUNBUFFERED": "1"}
    environ |= {"RAY_API_SERVER_ADDRESS": cluster.url("ray"), "SKIPLANE_HOME": str(real)}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"

    def start(*line: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def submit_line(*line: str) -> list[str]:
    return [sys.executable, "-m", "jobs.submit", *line]


def training(home: Path, storage: Path, name: str, *more: str) -> list[str]:
    return ["python", "-m", "jobs.train", "--recipe", "digits-quick", "--name", name, "--tracking.uri", "off",
            "--data.root", str(home / "data" / "digits"), "--cluster.storage", str(storage), *more]  # fmt: skip


def until(process: subprocess.Popen[str], words: str) -> str:
    """The output so far, once these words have come."""
    lines = list[str]()
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"'{words}' has not come: {''.join(lines)[-3000:]}")


@pytest.mark.slow
def test_real_codes(in_shell, home):
    """Two jobs at once: 0 and 2; and Ray's own line, with the file that ships."""
    show = "import os; print('seen:', *sorted(os.listdir()), os.environ['RAY_JOB_STOP_SIGNAL'])"
    good = in_shell(
        *submit_line("--id", "info", "--", "python", "-m", "jobs.pack", "info", str(home / "data" / "digits"))
    )
    bad = in_shell(*submit_line("--", "python", "-m", "jobs.train", "--recipe", "nope", "--name", "bad"))
    environment = ("--runtime-env", "infra/runtime-env.yaml", "--working-dir", ".")
    ray = in_shell("ray", "job", "submit", *environment, "--", "python", "-c", show)
    out = [process.communicate(timeout=120)[0] for process in (good, bad, ray)]
    assert [process.returncode for process in (good, bad, ray)] == [0, 2, 0], out
    assert out[0].count("1,437 images in 8 shards") == 1  # as it comes, and read whole at the end: shown once
    assert out[0].endswith("job info: it has finished\n")
    assert "error: recipe 'nope' does not exist" in out[1]
    assert out[1].endswith("job bad: it ended with exit code 2\n")
    found = set(re.search("seen: (.*)", out[2])[1].split())
    assert {"jobs", "orchestrator", "pipelines", "infra", "SIGINT"} <= found
    assert not found & {"tests", ".git", ".venv", "data", "runs"}


@pytest.mark.slow
def test_a_stop_leaves_a_checkpoint_although_the_cluster_says_nothing_of_it(in_shell, real, home, tmp_path):
    """What Prometheus reads of it meanwhile, and when it is over, is looked at too: it costs no cluster of its own."""
    process = in_shell(*submit_line("--", *training(home, tmp_path, "s", "--train.epochs", "200")))
    until(process, "epoch 1/200 done")
    busy = in_shell(*submit_line("--", *training(home, tmp_path, "s")))
    second = in_shell(*submit_line("--follow", "s"))
    until(second, "epoch 1/200 done")  # from the log's beginning
    scrape.check_alive(real, "s", workers=1)
    second.send_signal(signal.SIGINT)
    assert "job s goes on without this command" in second.communicate(timeout=30)[0]
    stop = in_shell("ray", "job", "stop", "s")
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 130, out
    assert "stopped; the same command goes on from the last checkpoint" in out
    assert out.endswith("job s: it was stopped; the same command goes on\n")
    result = json.loads((tmp_path / "s" / "result.json").read_text())
    assert (result["status"], result["resumable"]) == ("stopped", True)
    scrape.check_over(real, "s", workers=1, steps=result["steps"], images=64 * result["steps"])
    assert "has the name s now; follow it with --follow s" in busy.communicate(timeout=60)[0]
    assert (second.returncode, busy.returncode, stop.wait(timeout=60)) == (130, 4, 0)


@pytest.mark.slow
@pytest.mark.long
def test_a_head_that_is_killed_and_started_anew_costs_no_bit(in_shell, real, home, tmp_path):
    """The machine loses all of Ray at once; the run goes on, and ends with the weights of one undisturbed."""
    epochs = ("--train.epochs", "16")
    alone = in_shell(*submit_line("--", *training(home, tmp_path / "alone", "u", *epochs)))
    assert alone.wait(timeout=240) == 0, alone.stdout.read()
    process = in_shell(*submit_line("--", *training(home, tmp_path, "k", *epochs)))
    until(process, "epoch 3/16 done")
    cluster = local.load(real)
    for member in processes.members(cluster.services["ray"]):
        with suppress(psutil.Error):
            member.send_signal(signal.SIGKILL)
    shutil.rmtree(cluster.ray_temp)  # nor is anything left on its disk
    local.up(real, cluster.ports, print)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    assert "job k: the head was lost: the server knows this job no more" in out
    assert re.search(r"job k-2 is submitted to .*\n(.*\n)*k: .* from epoch \d+ step", out)
    assert out.endswith("job k-2: it has finished\n")
    weights = [json.loads((folder / "result.json").read_text())["weights_sha256"]
               for folder in (tmp_path / "alone" / "u", tmp_path / "k")]  # fmt: skip
    assert weights[0] == weights[1]
