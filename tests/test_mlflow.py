"""Tracking against a real MLflow: a SQLite file, and a server that is killed while points wait."""

import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import processes, services
from orchestrator.tracking import DatasetRef, Metric, open_tracker, server, study_view
from orchestrator.tracking.runs import MlflowTracker
from pipelines.errors import ClusterError, ConfigError
from tests import browser

# mlflow 3.17 maps its tables with an option that SQLAlchemy 2.1 deprecates.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]

KEYS = ("train/loss", "train/top1", "val/loss", "val/error")


def points(first: int, last: int, offset: float = 0.0) -> list[Metric]:
    """One point of each key a step, with timestamps that belong to the steps."""
    return [Metric(key, offset + 1 / (1 + step), step, 10**12 + step) for step in range(first, last) for key in KEYS]


class RealServer:
    """An MLflow server on a free port, over a database in a folder of its own; can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.ports = {"mlflow": probe.getsockname()[1]}
        self.uri = services.url("mlflow", self.ports)
        self.start()

    def start(self) -> None:
        command = services.command("mlflow", self.home, self.ports, "")
        surroundings = {**os.environ, **services.MLFLOW_SETTINGS}
        self.service = processes.start(command, surroundings, secrets.token_hex(16), self.home / "server.log")
        while not services.ready("mlflow", self.home, self.ports):
            assert processes.alive(self.service), processes.tail(self.home / "server.log", 20)
            time.sleep(0.1)

    def kill(self) -> None:
        for process in processes.members(self.service):
            process.kill()
        while processes.members(self.service):
            time.sleep(0.01)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    made = RealServer(tmp_path_factory.mktemp("mlflow"))
    yield made
    processes.end(made.service)


def history(client: Any, run_id: str) -> dict[str, list[int]]:
    return {key: [m.step for m in client.get_metric_history(run_id, key)] for key in KEYS}


def test_server_killed_while_points_wait(real: RealServer) -> None:
    """The caller is never held up; once the server is back everything arrives, once; sent again, nothing is doubled."""
    tracker = open_tracker(real.uri, "outage", "run", params={"a": "1"}, tags={})
    assert isinstance(tracker, MlflowTracker)
    tracker.metrics(points(0, 50))
    real.kill()
    began = time.monotonic()
    for step in range(50, 150):
        tracker.metrics(points(step, step + 1))
    assert time.monotonic() - began < 5  # 2 ms here; a blocked call would take at least its timeout of 10 s
    assert len(tracker._outbox) >= 400
    real.start()
    assert tracker.finish("FINISHED", 60.0) == 0
    client = server.Server(real.uri).client
    assert history(client, tracker.run_id) == {key: list(range(150)) for key in KEYS}
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    server.Server(real.uri).deliver(str(tracker.run_id), points(0, 150))
    assert history(client, tracker.run_id) == {key: list(range(150)) for key in KEYS}


def test_finish_gives_up_in_time_when_the_server_is_gone(tmp_path: Path, real: RealServer) -> None:
    tracker = open_tracker(real.uri, "outage", "left", params={}, tags={})
    real.kill()
    tracker.metrics(points(0, 10))
    left = tracker.finish("KILLED", 1.0)
    real.start()
    assert left == 4 * 10 + 1  # and the status


def test_stopped_server_refuses_the_start(real: RealServer) -> None:
    for process in processes.members(real.service):
        process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match=r"MLflow at http://127.0.0.1:\d+ does not answer"):
            open_tracker(real.uri, "e", "n", params={}, tags={})
    finally:
        for process in processes.members(real.service):
            process.send_signal(signal.SIGCONT)


def test_going_on_with_a_run(tmp_path: Path) -> None:
    """In a SQLite file: the same run again, nothing twice, what changed is a tag."""
    uri, data = f"sqlite:///{tmp_path}/new/mlflow.db", DatasetRef("digits", "d" * 64, "/data/digits")
    first = open_tracker(uri, "digits", "a", params={"lr": "0.1", "epochs": "6"}, tags={"skiplane.kind": "train"},
                         dataset=data, parent_id="p" * 32)  # fmt: skip
    first.metrics(points(0, 20))
    first.file(b"<svg/>", "figures/a.svg")
    assert first.finish("FAILED") == 0
    assert first.url is None
    again = open_tracker(
        uri, "digits", "a", run_id=first.run_id, params={"lr": "0.1", "epochs": "9", "new": "x"}, tags={}
    )
    client = server.Server(uri).client
    assert client.get_run(first.run_id).info.status == "RUNNING"
    again.metrics(points(10, 30, offset=0.5))
    assert again.finish("FINISHED") == 0
    run = client.get_run(first.run_id)
    assert (again.run_id, run.info.run_name, run.info.status) == (first.run_id, "a", "FINISHED")
    assert history(client, run.info.run_id) == {key: list(range(30)) for key in KEYS}
    assert run.data.params == {"lr": "0.1", "epochs": "6", "new": "x"}
    assert run.data.tags["now.epochs"] == "9"
    assert run.data.tags["mlflow.parentRunId"] == "p" * 32
    (dataset,) = (d.dataset for d in run.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == ("digits", "d" * 36)
    assert list(tmp_path.glob("new/mlartifacts/**/figures/a.svg"))


@pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes")  # in log_table, with pandas 3
@pytest.mark.parametrize("place", ["server", "file"])
def test_a_table_is_read_back_by_mlflow_itself(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Refreshed as a whole, and again by the next submission: no row is doubled."""
    uri = request.getfixturevalue("real").uri if place == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # load_table asks the server of the environment
    rows = [{"id": i, "key": f"key-{i}", "reason": "it's no 'JPEG', \u00e9"} for i in range(3)]
    tracker = open_tracker(uri, "tables", "a", params={}, tags={})
    for count in (1, 2):
        tracker.table(rows[:count], "bad_images.json")
    assert tracker.finish("FAILED", 30.0) == 0
    again = open_tracker(uri, "tables", "a", run_id=tracker.run_id, params={}, tags={})
    again.table(rows, "bad_images.json")
    assert again.finish("FINISHED", 30.0) == 0
    client = server.Server(uri).client
    experiment = client.get_run(tracker.run_id).info.experiment_id
    table = client.load_table(experiment, "bad_images.json", run_ids=[tracker.run_id])
    assert table.to_dict("records") == rows
    tags = client.get_run(tracker.run_id).data.tags
    ours = tags["mlflow.loggedArtifacts"]
    client.log_table(tracker.run_id, rows[0], "bad_images.json")  # MLflow's own way: the same file, the same tag
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"] == ours
    assert len(client.load_table(experiment, "bad_images.json", run_ids=[tracker.run_id])) == 4


def test_run_or_experiment_that_is_not_there(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ConfigError, match=r"run f+ is not at sqlite.*set tracking\.uri to where the run was started"):
        open_tracker(uri, "e", "n", run_id="f" * 32, params={}, tags={})
    tracker = open_tracker(uri, "e", "n", params={}, tags={})
    tracker.finish("FINISHED")
    client = server.Server(uri).client
    client.delete_run(tracker.run_id)
    with pytest.raises(ConfigError, match=r"was deleted at .*mlflow runs restore"):
        open_tracker(uri, "e", "n", run_id=tracker.run_id, params={}, tags={})
    client.delete_experiment(client.get_experiment_by_name("e").experiment_id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment 'e' was deleted"):
        open_tracker(uri, "e", "n", params={}, tags={})


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium to look at the page")
def test_saved_view_opens_the_curves_side_by_side(real: RealServer) -> None:
    """Zero clicks: the charts named in the view are drawn, each with a line for every run."""
    parent = open_tracker(real.uri, "digits", "demo", params={}, tags={})
    runs = {}
    for name in ("plain-18-s0", "plain-34-s0", "resnet-18-s0", "resnet-34-s0"):
        child = open_tracker(real.uri, "digits", name, params={}, tags={}, parent_id=parent.run_id)
        child.metrics(points(0, 20))
        assert child.finish("FINISHED") == 0
        runs[name] = child.run_id
    link = parent.view(study_view("demo", list(runs.values())))
    parent.finish("FINISHED")
    names = "p => [...new Set((p.data || []).map(d => d.name))].sort()"
    script = f"[...document.querySelectorAll('.js-plotly-plot')].map({names})"
    charts = browser.until(link, script, lambda seen: len(seen) >= 2 and all(len(lines) == 4 for lines in seen))
    assert len(charts) >= 2
    assert all(lines == sorted(runs) for lines in charts)
