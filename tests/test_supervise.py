"""A run on a real Ray cluster inside the command's own process: recovery, refusals, stopping, the same name again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from orchestrator.plan import counts_of, make_plan
from pipelines.dataset import open_dataset
from pipelines.quarantine import CHECKSUM
from pipelines.reader import Reader
from tests.datasets import garble

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


@pytest.mark.long
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


@pytest.mark.long
def test_two_drivers_of_one_name_and_a_lost_mailbox(command, tmp_path):
    """The second driver is refused while the first trains; the first then loses its mailbox, and goes on."""
    first = command("--name", "twin", "--train.checkpoint_steps", "7")
    wait_for(first, "epoch 1/3 done")
    [worker] = workers_of(first)
    worker.suspend()  # the driver lives, the training stands still
    code, out, err = finish(command("--name", "twin", "--train.checkpoint_steps", "7"))
    assert (code, "run 'twin' is being trained by process" in err) == (4, True), (out, err)
    [mailbox] = [p for p in psutil.Process(first.pid).children(recursive=True) if "ray::Post" in " ".join(p.cmdline())]
    mailbox.kill()
    worker.resume()
    code, out, err = finish(first)
    assert code == 0, err[-3000:]
    assert "restart 1: the driver's mailbox is gone" in out
    assert result(tmp_path, "twin")["status"] == "finished"
    [lease] = (tmp_path / "runs" / "twin" / "lease").iterdir()
    assert json.loads(lease.read_text())["released"]


@pytest.fixture
def digits(home, tmp_path):
    """A copy of the packed digits, to damage."""
    return open_dataset(shutil.copytree(home / "data" / "digits", tmp_path / "digits"))


def order_of(settings_for, digits):
    """Which images a quick run on these digits is fed."""
    return make_plan(settings_for("--data.root", str(digits.root)), counts_of(digits)).order


def bad_table(tmp_path, monkeypatch, name):
    """The rows of the table on a run's page, as MLflow reads them, and the run's tags."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # load_table asks it
    runs, client = mlflow_runs(tmp_path)
    info = runs[name].info
    table = client.load_table(info.experiment_id, "bad_images.json", run_ids=[info.run_id])
    return table.to_dict("records"), runs[name].data.tags


@pytest.mark.long
def test_images_that_decode_silently_wrong_are_named_wherever_one_looks(
    command, digits, settings_for, tmp_path, monkeypatch
):
    """Past the limit the run fails; the same name goes on with a higher one, and knows the image from before."""
    order = order_of(settings_for, digits)
    sample = int(order.ids(0, 0, [0])[0, 3])
    garble(digits, "train", sample)
    garble(digits, "val", 7)
    flags = ("--name", "hurt", "--data.root", str(digits.root), "--cluster.workers", "2")
    with closing(Reader(digits, "train")) as train, closing(Reader(digits, "val")) as val:
        names = {"train": train.name(sample), "val": val.name(7)}
    line = {split: f"{shard} {key} ({CHECKSUM}), replaced by sample" for split, (shard, key) in names.items()}

    code, out, err = finish(command(*flags))
    shard, key = names["train"]
    sentence = (
        f"bad images in train: 1, data.max_bad allows 0; the last: {key} in {shard} ({CHECKSUM}); repair the data"
    )
    assert (code, f"error: {sentence}" in err) == (3, True), err[-3000:]
    failed = result(tmp_path, "hurt")
    assert (failed["status"], failed["reason"].startswith(sentence)) == ("failed", True)
    assert [(i["split"], i["id"]) for i in failed["bad_images"]] == [("train", sample)]
    assert bad_table(tmp_path, monkeypatch, "hurt")[0] == failed["bad_images"]

    code, out, err = finish(command(*flags, "--data.max_bad", "0.003"))
    assert code == 0, err[-3000:]
    assert f"bad images known from before: 1, see {tmp_path}/runs/hurt/bad_images.json" in out
    assert f"bad image in train: {line['train']}" not in out  # said by the submission before
    assert out.count(f"bad image in val: {line['val']} 6") == 1  # in three epochs
    whole = result(tmp_path, "hurt")
    assert [(i["split"], i["id"], i["shard"], i["key"], i["reason"]) for i in whole["bad_images"]] == [
        ("train", sample, *names["train"], CHECKSUM),
        ("val", 7, *names["val"], CHECKSUM),
    ]
    steps = range(order.steps_per_epoch)
    times = sum(sample in order.ids(epoch, step, range(4)) for epoch in range(3) for step in steps)
    assert whole["bad_samples"] == times > 1
    assert f"1 bad image, replaced {times} times" in out
    assert "of 360 validation images, 1 of them bad and replaced" in out
    rows, tags = bad_table(tmp_path, monkeypatch, "hurt")
    assert (rows, tags["skiplane.bad_images"]) == (whole["bad_images"], "2")


def test_two_workers_each_below_the_limit_fail_together(command, digits, settings_for, tmp_path):
    """Each worker reads a stream of its own, with one bad image in it; one is allowed, in the whole run."""
    order = order_of(settings_for, digits)
    samples = [int(order.ids(0, 0, [lane])[0, 3]) for lane in (0, 2)]
    for sample in samples:
        garble(digits, "train", sample)
    flags = ("--data.root", str(digits.root), "--cluster.workers", "2", "--data.max_bad", str(1 / 1437))
    code, out, err = finish(command("--name", "both", *flags))
    assert (code, "error: bad images in train: 2, data.max_bad allows 1; the last: " in err) == (3, True), err[-3000:]
    assert out.count("bad image in train: ") == 2
    assert sorted(i["id"] for i in result(tmp_path, "both")["bad_images"]) == sorted(samples)


REFUSED = [
    (["--data.root", "/no/such/place"], 2, "data.root is /no/such/place, which does not exist"),
    (["--model.init", "/no/such.pt"], 2, "weights file /no/such.pt cannot be used"),
    (["--tracking.uri", "http://127.0.0.1:9"], 4, "http://127.0.0.1:9"),
    (["--tracking.uri", "file:///tmp/mlruns"], 2, "tracking.uri"),
    pytest.param(
        ["--data.decode", "gpu"], 2, "data.decode is gpu, but this worker has no GPU", marks=pytest.mark.long
    ),  # a worker says it, so a group has to start
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
