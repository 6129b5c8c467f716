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
from orchestrator.tracking import (
    DatasetRef,
    Metric,
    child_runs,
    end_run,
    new_run,
    open_tracker,
    server,
    study_view,
    sweep_view,
)
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
    with browser.opened(link) as page:
        charts = page.until(script, lambda seen: len(seen) >= 2 and all(len(lines) == 4 for lines in seen))
        assert all(lines == sorted(runs) for lines in charts)


# -- the trials of a sweep ---------------------------------------------------------------------------------------------

SETTINGS = {f"optim.setting_{i}": "x" for i in range(60)}  # about as many as a run has
DIGITS = DatasetRef("digits", "d" * 64, "/data/digits")


def test_run_made_before_its_trial_starts_gets_what_a_new_one_has(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = new_run(uri, "digits", "resnet-34 lr=0.1", parent_id="p" * 32, tags={"skiplane.kind": "trial"})
    client = server.Server(uri).client
    assert client.get_run(run_id).info.status == "SCHEDULED"
    for _ in range(2):  # and again, as a trial that goes on
        tracker = open_tracker(uri, "digits", "t001", run_id=run_id, params=SETTINGS, tags={"skiplane.run": "t001"},
                               dataset=DIGITS)  # fmt: skip
        assert client.get_run(run_id).info.status == "RUNNING"
        tracker.metrics(points(0, 20))
        assert tracker.finish("FINISHED") == 0
        run = client.get_run(run_id)
        assert (tracker.run_id, run.info.run_name, run.info.status) == (run_id, "resnet-34 lr=0.1", "FINISHED")
        assert run.data.params == SETTINGS
        assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["digits"]
        known = {name: run.data.tags[name] for name in ("mlflow.parentRunId", "skiplane.kind", "skiplane.run")}
        assert known == {"mlflow.parentRunId": "p" * 32, "skiplane.kind": "trial", "skiplane.run": "t001"}
        assert history(client, run_id) == {key: list(range(20)) for key in KEYS}


def test_a_trial_costs_few_requests(real: RealServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that asks whether the server is there. MLflow's own callback for Tune sends 13 with every report."""
    import requests

    sent: list[str] = []
    request = requests.Session.request

    def counted(session: Any, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        sent.append(url.rpartition("/mlflow/")[2].split("?")[0])
        return request(session, method, url, *args, **kwargs)

    monkeypatch.setattr(requests.Session, "request", counted)
    run_id = new_run(real.uri, "counted", "a", parent_id=None, tags={"skiplane.kind": "trial"})
    assert sent == ["experiments/get-by-name", "experiments/create", "runs/create", "runs/get", "runs/update"]
    sent.clear()
    new_run(real.uri, "counted", "b", parent_id=None, tags={"skiplane.kind": "trial"})
    assert sent == ["experiments/get-by-name", "runs/create", "runs/get", "runs/update"]
    sent.clear()
    tracker = open_tracker(
        real.uri, "counted", "a", run_id=run_id, params=SETTINGS, tags={"skiplane.run": "a"}, dataset=DIGITS
    )
    assert sent == ["runs/get", "runs/get", "runs/update", "runs/log-batch", "runs/log-inputs"]
    tracker.finish("FINISHED")
    sent.clear()
    end_run(real.uri, run_id, "FAILED", {"skiplane.state": "failed"})
    assert sent == ["runs/log-batch", "runs/update"]


def test_driver_ends_what_nobody_has_open(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = new_run(uri, "digits", "a", parent_id=None, tags={})
    end_run(uri, run_id, "FAILED", {"skiplane.state": "failed", "skiplane.reason": "no memory"})
    run = server.Server(uri).client.get_run(run_id)
    assert (run.info.status, run.data.tags["skiplane.reason"]) == ("FAILED", "no memory")
    assert run.info.end_time >= run.info.start_time
    with pytest.raises(ConfigError, match=r"run f+ is not at sqlite"):
        end_run(uri, "f" * 32, "FAILED", {"skiplane.state": "failed"})


def test_driver_finds_the_runs_that_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several pages; the first of two that a driver made for one trial; no other parent's, and no deleted one."""
    monkeypatch.setattr(server, "PAGE", 2)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent, other = (new_run(uri, "digits", name, parent_id=None, tags={}) for name in ("s1", "s2"))
    assert child_runs(uri, parent, "trial") == {}
    made = {f"t{i}": new_run(uri, "digits", "a", parent_id=parent, tags={"trial": f"t{i}"}) for i in range(5)}
    time.sleep(0.002)  # runs are ordered by their start, in milliseconds
    new_run(uri, "digits", "a", parent_id=parent, tags={"trial": "t3"})
    new_run(uri, "digits", "a", parent_id=parent, tags={})
    new_run(uri, "digits", "a", parent_id=other, tags={"trial": "t9"})
    server.Server(uri).client.delete_run(made.pop("t0"))
    assert child_runs(uri, parent, "trial") == made
    with pytest.raises(ConfigError, match=r"run f+ is not at sqlite"):
        child_runs(uri, "f" * 32, "trial")


RATES, NETS = (0.01, 0.1, 1.0), ("plain-18", "plain-34", "resnet-18", "resnet-34")


def trial_of(uri: str, parent: str | None, name: str, top1: float | None, params: dict[str, str]) -> None:
    """A child with a curve up to `top1`; None: one that failed before it was heard of."""
    run_id = new_run(uri, "digits", name, parent_id=parent, tags={"skiplane.kind": "trial"})
    if top1 is None:
        return end_run(uri, run_id, "FAILED", {"skiplane.state": "failed"})
    tracker = open_tracker(uri, "digits", name, run_id=run_id, params=params, tags={"skiplane.state": "finished"})
    for epoch in range(1, 7):
        value, stamp = top1 * epoch / 6, (22 * epoch, 10**12 + epoch)
        tracker.metrics([Metric(key, value, *stamp) for key in ("val/top1", "val/top1_best")])
        tracker.metrics([Metric(key, 3.0 - value, *stamp) for key in ("train/loss", "val/loss")])
    assert tracker.finish("FINISHED", 30.0) == 0
    return None


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium to look at the page")
def test_saved_view_of_a_sweep_shows_all_trials_flat_and_best_first(real: RealServer) -> None:
    """Zero clicks: twelve rows in their order, and what was varied beside the result. One trial failed; another has
    not got a parameter that the others vary."""
    parent = open_tracker(real.uri, "digits", "s1", params={}, tags={"skiplane.kind": "sweep"})
    names = [f"{net} lr={rate:g}" for rate in RATES for net in NETS]
    tops = [(7 * number + 3) % 12 / 12 for number in range(11)]  # all unlike, in no order
    for name, top1 in zip(names, [*tops, None], strict=True):
        net, _, rate = name.partition(" lr=")
        params = {"model.depth": net[-2:], "optim.lr": rate}
        trial_of(real.uri, parent.run_id, name, top1, params if name != names[5] else {"optim.lr": rate})
    view = sweep_view("s1", str(parent.run_id), ["model.depth", "optim.lr"], "val/top1", more_is_better=True, runs=12)
    link = parent.view(view)
    parent.finish("FINISHED")
    rows = "[...document.querySelectorAll('.ag-row')].filter(r => r.innerText.includes('lr='))"
    listed = f"{rows}.sort((a, b) => a.getAttribute('row-index') - b.getAttribute('row-index'))"
    axes = "[...document.querySelectorAll('.parcoords .dimension .label')].map(label => label.textContent)"
    canvas = "document.querySelector('.parcoords canvas.foreground')"
    drawn = f"{canvas}.getContext('2d').getImageData(0, 0, {canvas}.width, {canvas}.height).data.some(byte => byte)"
    script = f"({{rows: {listed}.map(r => r.innerText.split('\\n').pop()), axes: {axes}, drawn: {canvas} && {drawn}}})"
    best_first = [name for _, name in sorted(zip(tops, names[:11], strict=True), reverse=True)]
    with browser.opened(link) as page:
        seen = page.until(script, lambda seen: seen and len(seen["rows"]) == 12 and seen["drawn"])
        assert seen == {
            "rows": [*best_first, names[11]],
            "axes": ["model.depth", "optim.lr", "val/top1_best"],
            "drawn": True,
        }
