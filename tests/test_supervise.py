"""A run on a real Ray cluster inside the command's own process: recovery, refusals, stopping, the same name again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
QUICK = ("--recipe", "digits-quick", "--model.width", "4", "--train.epochs", "3", "--tracking.progress_seconds", "0.1")


@pytest.fixture
def command(home, tmp_path):
    """Starts `python -m jobs.train` with this test's storage and its own MLflow file."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"SKIPLANE_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    started = []

    def start(*flags: str) -> subprocess.Popen:
        place = ("--cluster.storage", str(tmp_path / "runs"), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
        line = [sys.executable, "-m", "jobs.train", *QUICK, *place, *flags]
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(process, words):
    """Reads lines until one has these words."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the command ended without '{words}': {process.stderr.read()[-2000:]}")


def result(tmp_path, name):
    return json.loads((tmp_path / "runs" / name / "result.json").read_text())


def workers_of(process):
    """The training workers among a command's descendants, by the title that Ray gives them."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if "RayTrainWorker" in " ".join(p.cmdline())]


def mlflow_runs(tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return {r.info.run_name: r for r in client.search_runs(experiments)}, client


def test_a_killed_worker_changes_nothing(command, tmp_path):
    flags = ("--cluster.workers", "2", "--train.checkpoint_steps", "7")
    code, out, err = finish(command("--name", "whole", *flags))
    assert code == 0, err[-3000:]
    hurt = command("--name", "hurt", *flags)
    wait_for(hurt, "epoch 1/3 done")
    workers = workers_of(hurt)
    assert len(workers) == 2
    workers[1].kill()  # SIGKILL
    code, out, err = finish(hurt)
    assert code == 0, err[-3000:]
    assert "restart 1:" in out
    assert "0 samples lost" in out
    whole, hurt = result(tmp_path, "whole"), result(tmp_path, "hurt")
    assert hurt["restarts"] == 1
    for key in ("weights_sha256", "data_digest", "eval_digest", "top1", "train_loss", "steps"):
        assert hurt[key] == whole[key], key
    runs, client = mlflow_runs(tmp_path)
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert runs["hurt"].data.tags["skiplane.restarts"] == "1"
    histories = {n: client.get_metric_history(r.info.run_id, "train/loss") for n, r in runs.items()}
    # A restart repeats steps, the curve does not: each step once, and the same values.
    assert len({m.step for m in histories["hurt"]}) == len(histories["hurt"])
    last = {n: max(h, key=lambda m: m.step).value for n, h in histories.items()}
    assert last["hurt"] == last["whole"]


def test_a_stop_leaves_a_checkpoint_and_the_same_name_goes_on(command, tmp_path):
    cut = command("--name", "cut", "--cluster.workers", "2")
    wait_for(cut, "epoch 1/3 done")
    processes = psutil.Process(cut.pid).children(recursive=True)
    cut.send_signal(signal.SIGTERM)
    code, _, err = finish(cut)
    assert code == 128 + signal.SIGTERM, err[-3000:]
    assert result(tmp_path, "cut")["status"] == "stopped"
    assert mlflow_runs(tmp_path)[0]["cut"].info.status == "KILLED"
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive  # no process stays behind
    # Another identity is refused, another placement goes on.
    code, _, err = finish(command("--name", "cut", "--optim.lr", "0.3"))
    assert (code, "optim.lr was 0.2, is 0.3" in err) == (2, True)
    code, out, err = finish(command("--name", "cut", "--cluster.workers", "1"))
    assert code == 0, err[-3000:]
    assert "from epoch" in out
    ended = result(tmp_path, "cut")
    assert (ended["status"], ended["world_size"], ended["epochs"]) == ("finished", 1, 3)
    assert mlflow_runs(tmp_path)[0]["cut"].info.status == "FINISHED"
    # And once more: it is finished, at once.
    code, out, _ = finish(command("--name", "cut"))
    assert (code, "run cut is finished" in out) == (0, True)


def test_two_drivers_of_one_name_and_a_lost_mailbox(command, tmp_path):
    """The second driver is refused while the first trains; the first then loses its mailbox, and goes on."""
    first = command("--name", "twin", "--train.checkpoint_steps", "7")
    wait_for(first, "epoch 1/3 done")
    [worker] = workers_of(first)
    worker.suspend()  # the driver lives, the training stands still
    code, out, err = finish(command("--name", "twin", "--train.checkpoint_steps", "7"))
    assert (code, "run 'twin' is being trained by process" in err) == (4, True), (out, err)
    [mailbox] = [p for p in psutil.Process(first.pid).children(recursive=True) if "_Mailbox" in " ".join(p.cmdline())]
    mailbox.kill()
    worker.resume()
    code, out, err = finish(first)
    assert code == 0, err[-3000:]
    assert "restart 1: the driver's mailbox is gone" in out
    assert result(tmp_path, "twin")["status"] == "finished"
    assert not (tmp_path / "runs" / "twin" / "lease.json").exists()


REFUSED = [
    (["--data.root", "/no/such/place"], 2, "data.root is /no/such/place, which does not exist"),
    (["--model.init", "/no/such.pt"], 2, "weights file /no/such.pt cannot be used"),
    (["--tracking.uri", "http://127.0.0.1:9"], 4, "http://127.0.0.1:9"),
    (["--tracking.uri", "file:///tmp/mlruns"], 2, "tracking.uri"),
    (["--data.decode", "gpu"], 2, "data.decode is gpu, but this worker has no GPU"),
]


@pytest.mark.parametrize(("flags", "code", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(command, tmp_path, flags, code, sentence):
    got, _, err = finish(command("--name", "bad", *flags))
    assert (got, sentence in err) == (code, True), err[-2000:]
    assert err.startswith("error: ")
    assert "Traceback" not in err
    if "decode" not in sentence:  # found by the worker: the run exists by then, and has a result that says so
        assert not (tmp_path / "runs" / "bad" / "run.json").exists()


def test_a_cluster_that_is_too_small_is_refused_with_what_is_there(home, tmp_path):
    from pipelines.errors import ClusterError

    sys.modules.pop("ray", None)
    code = (
        "from orchestrator.cluster.session import Node, choose_workers\n"
        "found = [Node('a', '10.0.0.1', 2.0, 0.0), Node('b', '10.0.0.2', 1.0, 1.0)]\n"
        "assert choose_workers((2, 8), found, 1, 0) == 3\n"
        "assert choose_workers((1, 8), found, 1, 1) == 1\n"
        "choose_workers((4, 8), found, 1, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ClusterError.__name__ in done.stderr
    assert "asks for 4 workers of 1 CPU each; the cluster has room for 3 (10.0.0.1: 2 CPUs 0 GPUs" in done.stderr
