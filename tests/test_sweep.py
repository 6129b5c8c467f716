"""A sweep on a real Ray cluster inside the command's own process: what it leaves, refuses, and takes up again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.config import flatten
from orchestrator.settings import Edge, load, parser
from orchestrator.state.storage import Storage
from orchestrator.sweep.journal import Journal

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
QUICK = ("--recipe", "digits-quick", "--model.width", "4", "--train.epochs", "3", "--name", "s")
SPACE = ("--sweep.depth", "18,34", "--sweep.lr", "0.05,0.001")
EQUAL = ("id", "title", "config", "state", "reason", "epochs", "top1", "train_loss", "weights_sha256")


# Ray's, of the node: they outlive a cluster inside a process that is killed.
AGENTS = {"ray::RuntimeEnvAgent", "ray::DashboardAgent"}


@pytest.fixture
def command(home, tmp_path):
    """Starts `python -m jobs.sweep` with this test's storage and its own MLflow file; returns it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"SKIPLANE_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    started = []

    def start(*flags: str, storage="runs", job="jobs.sweep") -> subprocess.Popen:
        place = ("--cluster.storage", str(tmp_path / storage), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
        process = subprocess.Popen(
            [sys.executable, "-m", job, *place, *flags],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def finish(process):
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def result(folder):
    return json.loads((folder / "s" / "result.json").read_text())


def told(found):
    return [{name: trial[name] for name in EQUAL} for trial in found["trials"]]


def test_a_sweep_ends_with_an_answer_that_holds(command, tmp_path, home):
    code, out, err = finish(command(*QUICK, *SPACE))
    assert (code, err) == (0, ""), out
    found = result(tmp_path / "runs")
    assert found["status"] == "finished"
    assert [t["title"] for t in found["trials"]] == [
        "resnet-18 lr=0.05", "resnet-18 lr=0.001", "resnet-34 lr=0.05", "resnet-34 lr=0.001"
    ]  # fmt: skip
    ends = {t["id"]: (t["state"], t["epochs"]) for t in found["trials"]}
    assert ends["t001"] == ("finished", 3)
    assert ("stopped", 1) in ends.values()
    best = next(t for t in found["trials"] if t["id"] == found["best"])
    assert best["top1"] == max(t["top1"] for t in found["trials"] if t["state"] == "finished")
    # people see the ranking, scripts the same; the table's rows are in its order
    assert f"     1  {best['id']}   {best['title'].split()[0]}" in out
    assert (tmp_path / "runs/s/pareto.svg").read_bytes().startswith(b"<?xml")
    # the recipe and the command are the winner
    recipe = yaml.safe_load(Path(found["recipe"]).read_text())
    assert recipe["optim"]["lr"] == best["config"]["optim.lr"]
    words = found["command"].split()
    assert words[:3] == ["python", "-m", "jobs.train"]
    _, again = load(words[3:], parser("", ""), Edge(home))
    trained = json.loads((tmp_path / "runs/s" / best["id"] / "run.json").read_text())["settings"]
    own = {"name", "cluster.storage", "train.stop_after"}
    plain = json.loads(json.dumps(flatten(again)))
    assert {n: v for n, v in plain.items() if trained[n] != v and n not in own} == {}
    # MLflow: one run for the sweep, a child for each trial, as it ended
    children = mlflow_children(tmp_path, found)
    assert {r.data.tags["skiplane.trial"]: r.info.run_name for r in children} == {
        t["id"]: t["title"] for t in found["trials"]
    }
    assert all(r.info.status == "FINISHED" for r in children)
    assert {r.data.params["optim.lr"] for r in children} == {"0.05", "0.001"}
    # the same command shows it again, another space is refused, and so is the name for a run
    code, out, _ = finish(command(*QUICK, *SPACE))
    assert (code, out.splitlines()[0]) == (0, "sweep s is finished; another --name searches anew")
    code, _, err = finish(command(*QUICK, *SPACE, "--sweep.factor", "2"))
    assert code == 2
    assert "name 's' belongs to another sweep" in err
    assert "sweep.factor was 3.0, is 2.0; use those settings again, or another --name" in err
    code, _, err = finish(command(*QUICK, job="jobs.train"))
    assert (code, "name 's' is a sweep in" in err) == (2, True)


def mlflow_children(tmp_path, found):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    first = client.get_run(found["trials"][0]["mlflow_run_id"])
    parent = first.data.tags["mlflow.parentRunId"]
    assert client.get_run(parent).data.tags["skiplane.kind"] == "sweep"
    assert client.get_run(parent).info.status == "FINISHED"
    assert found["best"] in client.get_run(parent).data.tags["mlflow.note.content"]
    return client.search_runs([first.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")


def reports(folder):
    return sum(trial.epoch for trial in Journal(Storage(str(folder / "s"))).trials().values())


def until(process, folder, count):
    """Waits until so many epochs were reported; the test's own time limit ends a wait in vain."""
    while reports(folder) < count:
        assert process.poll() is None, process.stderr.read()[-2000:]
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue


def members(process, title):
    """Descendants of a command by the title that Ray gives them; waits until there are some."""
    while True:
        family = psutil.Process(process.pid).children(recursive=True)
        if found := [p for p in family if title in " ".join(_command(p))]:
            return found
        assert process.poll() is None


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


@pytest.mark.long
def test_driver_killed_twice_and_trials_drivers_and_workers_once_change_nothing(command, tmp_path):
    assert finish(command(*QUICK, *SPACE, storage="calm"))[0] == 0
    wild = tmp_path / "wild"
    process = command(*QUICK, *SPACE, storage="wild")
    for reported, victim in ((1, "driver"), (2, "RayTrainWorker"), (3, "driver"), (4, "ResourceTrainable")):
        until(process, wild, reported)
        if victim != "driver":
            for one in members(process, victim):
                one.kill()
            continue
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(family, timeout=30)
        left = [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        assert {p.name() for p in left} <= AGENTS
        for agent in left:
            agent.kill()
        process = command(*QUICK, *SPACE, storage="wild")
    code, out, err = finish(process)
    assert (code, err) == (0, ""), out
    assert told(result(wild)) == told(result(tmp_path / "calm"))
    assert result(wild)["best"] == result(tmp_path / "calm")["best"]
    assert "the trial's driver died" in out


@pytest.mark.long
def test_sigterm_saves_what_runs_and_the_same_command_goes_on(command, tmp_path):
    process = command(*QUICK, *SPACE)
    until(process, tmp_path / "runs", 2)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (143, ""), out
    cut = result(tmp_path / "runs")
    assert (cut["status"], cut["reason"]) == ("stopped", "asked to by SIGTERM; the same command goes on")
    assert not [t for t in cut["trials"] if t["state"] == "running"]
    code, out, err = finish(command(*QUICK, *SPACE))
    assert (code, err) == (0, ""), out
    assert result(tmp_path / "runs")["status"] == "finished"


@pytest.mark.long
def test_a_trial_that_diverges_is_marked_and_too_many_end_the_sweep(command, tmp_path):
    space = ("--sweep.lr", "0.05,900", "--sweep.stop", "none", "--optim.momentum", "0.99")
    code, out, err = finish(command(*QUICK, *space, "--train.precision", "fp32"))
    assert (code, err) == (0, ""), out
    good, bad = result(tmp_path / "runs")["trials"]
    assert (good["state"], bad["state"]) == ("finished", "failed")
    assert bad["reason"].startswith("training diverged at step")
    code, out, err = finish(command(*QUICK, *space, "--sweep.max-failures", "0", storage="other"))
    assert code == 5
    assert "1 trials failed, sweep.max_failures allows 0" in err


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (("--sweep.workers", "18=1,34=99", "--data.lanes", "128", "--train.global_batch", "128"), 4,
         "depth 34 asks for 99 workers of 1 CPU each, and the cluster has room for"),
    ],
)  # fmt: skip
def test_what_could_never_be_placed_is_refused_at_once(command, tmp_path, flags, code, sentence):
    ended, _, err = finish(command(*QUICK, *SPACE, *flags))
    assert ended == code
    assert sentence in err
    assert not (tmp_path / "runs/s/sweep.json").exists()
