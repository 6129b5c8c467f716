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
from orchestrator.state.storage import Storage
from orchestrator.tracking import (
    DatasetRef,
    Metric,
    Others,
    Place,
    Tracker,
    add_last,
    look_for_server,
    open_tracker,
    server,
    study_view,
    sweep_view,
)
from orchestrator.tracking.shipper import shipper
from orchestrator.tracking.verify import verify
from pipelines.errors import ClusterError, ConfigError
from tests import browser

# mlflow 3.17 maps its tables with an option that SQLAlchemy 2.1 deprecates.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]

KEYS = ("train/loss", "train/top1", "val/loss", "val/error")


def points(first: int, last: int, offset: float = 0.0) -> list[Metric]:
    """One point of each key a step, with timestamps that belong to the steps."""
    return [Metric(key, offset + 1 / (1 + step), step, 10**12 + step) for step in range(first, last) for key in KEYS]


def opened(place: Path, uri: str, experiment: str, lease: int = 1, **more: Any) -> Tracker:
    """The run of the folder `place`, named as it."""
    told: dict[str, Any] = {"params": {}, "tags": {}, "id": f"{abs(hash(str(place))):x}"} | more
    return open_tracker(Place(Storage(str(place)), lease), uri, experiment, told.pop("name", place.name), **told)


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


@pytest.fixture
def own_shipper() -> Iterator[None]:
    """A process of this test's, which does not know of other tests' outages."""
    yield
    shipper().end()
    shipper.cache_clear()


def history(client: Any, run_id: str | None) -> dict[str, list[int]]:
    return {key: [m.step for m in client.get_metric_history(run_id, key)] for key in KEYS}


@pytest.mark.usefixtures("own_shipper")
def test_server_and_sender_are_killed_while_points_wait(tmp_path: Path, real: RealServer) -> None:
    """The caller is never held up; once the server is back everything arrives, once; sent again, nothing is doubled."""
    tracker = opened(tmp_path / "run", real.uri, "outage", params={"a": "1"})
    tracker.metrics(points(0, 50))
    real.kill()
    began = time.monotonic()
    for step in range(50, 150):
        tracker.metrics(points(step, step + 1))
    assert time.monotonic() - began < 5  # 2 ms here; a blocked call would take at least its timeout of 10 s
    assert shipper().wait(lambda: shipper().away, 60)
    killed = shipper()._process
    assert killed is not None
    killed.kill()
    real.start()
    assert (shipped := tracker.finish("FINISHED")).left == 0
    assert shipped.refused == 0
    storage = Storage(str(tmp_path / "run"))
    compared = verify(storage, server.Server(real.uri))
    assert (compared.points, compared.differences) == (600, [])
    client = server.Server(real.uri).client
    assert history(client, tracker.run_id) == {key: list(range(150)) for key in KEYS}
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.usefixtures("own_shipper")
def test_finish_gives_up_in_time_and_the_next_submission_sends_what_is_left(tmp_path: Path, real: RealServer) -> None:
    tracker = opened(tmp_path / "left", real.uri, "outage", wait_s=1.0)
    real.kill()
    tracker.metrics(points(0, 10))
    shipped = tracker.finish("KILLED")
    assert 10 < shipped.left <= shipped.records == 12
    again = opened(tmp_path / "left", real.uri, "outage", lease=2)  # known: it does not need the server
    again.metrics(points(5, 15))
    real.start()
    assert again.finish("FINISHED").left == 0
    client = server.Server(real.uri).client
    assert history(client, tracker.run_id) == {key: list(range(15)) for key in KEYS}
    assert again.run_id == tracker.run_id


def test_stopped_server_refuses_the_start(tmp_path: Path, real: RealServer) -> None:
    for process in processes.members(real.service):
        process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match=r"MLflow at http://127.0.0.1:\d+ does not answer"):
            look_for_server(Storage(str(tmp_path / "run")), real.uri)
    finally:
        for process in processes.members(real.service):
            process.send_signal(signal.SIGCONT)


def test_going_on_with_a_run(tmp_path: Path) -> None:
    """In a SQLite file: the same run again, nothing twice, what changed is a tag; it is part of the run above."""
    uri, data = f"sqlite:///{tmp_path}/new/mlflow.db", DatasetRef("digits", "d" * 64, "/data/digits")
    parent = opened(tmp_path / "s", uri, "digits")
    first = opened(tmp_path / "s" / "a", uri, "digits", params={"lr": "0.1", "epochs": "6"}, dataset=data, child=True,
                   tags={"skiplane.kind": "train"})  # fmt: skip
    first.metrics(points(0, 20))
    first.file(b"<svg/>", "figures/a.svg")
    assert first.finish("FAILED").left == 0
    assert first.url is None
    client = server.Server(uri).client
    assert client.get_run(first.run_id).info.status == "FAILED"
    again = opened(tmp_path / "s" / "a", uri, "digits", 2, params={"lr": "0.1", "epochs": "9", "new": "x"}, name="b")
    assert client.get_run(first.run_id).info.status == "RUNNING"
    again.metrics(points(10, 30, offset=0.5))
    assert again.finish("FINISHED").left == 0
    run = client.get_run(first.run_id)
    assert (again.run_id, run.info.run_name, run.info.status) == (first.run_id, "a", "FINISHED")
    assert history(client, run.info.run_id) == {key: list(range(30)) for key in KEYS}
    assert run.data.params == {"lr": "0.1", "epochs": "6", "new": "x"}
    assert run.data.tags["now.epochs"] == "9"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    (dataset,) = (d.dataset for d in run.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == ("digits", "d" * 36)
    assert list(tmp_path.glob("new/mlartifacts/**/figures/a.svg"))
    add_last(Place(Storage(str(tmp_path / "s" / "a")), 3), "FAILED", {"skiplane.reason": "no memory"})
    assert parent.finish("FINISHED").left == 0
    assert Others(uri).end([Storage(str(tmp_path / "s" / "a"))], 60.0).left == 0
    run = client.get_run(first.run_id)
    assert (run.info.status, run.data.tags["skiplane.reason"]) == ("FAILED", "no memory")


@pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes")  # in log_table, with pandas 3
@pytest.mark.parametrize("place", ["server", "file"])
def test_a_table_is_read_back_by_mlflow_itself(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Refreshed as a whole, and again by the next submission: no row is doubled."""
    uri = request.getfixturevalue("real").uri if place == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # load_table asks the server of the environment
    rows = [{"id": i, "key": f"key-{i}", "reason": "it's no 'JPEG', \u00e9"} for i in range(3)]
    tracker = opened(tmp_path / "a", uri, "tables")
    for count in (1, 2):
        tracker.table(rows[:count], "bad_images.json")
    assert tracker.finish("FAILED").left == 0
    again = opened(tmp_path / "a", uri, "tables", 2)
    again.table(rows, "bad_images.json")
    assert again.finish("FINISHED").left == 0
    client = server.Server(uri).client
    experiment = client.get_run(tracker.run_id).info.experiment_id
    table = client.load_table(experiment, "bad_images.json", run_ids=[tracker.run_id])
    assert table.to_dict("records") == rows
    tags = client.get_run(tracker.run_id).data.tags
    ours = tags["mlflow.loggedArtifacts"]
    client.log_table(tracker.run_id, rows[0], "bad_images.json")  # MLflow's own way: the same file, the same tag
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"] == ours
    assert len(client.load_table(experiment, "bad_images.json", run_ids=[tracker.run_id])) == 4


def test_run_or_experiment_that_is_gone(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = opened(tmp_path / "a", uri, "e")
    tracker.finish("FINISHED")
    with pytest.raises(ConfigError, match=r"is not at sqlite.*set tracking\.uri to where the run was started"):
        opened(tmp_path / "a", f"sqlite:///{tmp_path}/other.db", "e", 2)
    client = server.Server(uri).client
    client.delete_run(tracker.run_id)
    with pytest.raises(ConfigError, match=r"was deleted at .*mlflow runs restore"):
        opened(tmp_path / "a", uri, "e", 3)
    client.delete_experiment(client.get_experiment_by_name("e").experiment_id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment 'e' was deleted"):
        opened(tmp_path / "b", uri, "e")
    assert not (tmp_path / "b" / "tracking").is_dir() or not list((tmp_path / "b" / "tracking").rglob("*.jsonl"))


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium to look at the page")
def test_saved_view_opens_the_curves_side_by_side(tmp_path: Path, real: RealServer) -> None:
    """Zero clicks: the charts named in the view are drawn, each with a line for every run."""
    parent, names = opened(tmp_path, real.uri, "digits"), ("plain-18-s0", "plain-34-s0", "resnet-18-s0", "resnet-34-s0")
    for name in names:
        child = opened(tmp_path / name, real.uri, "digits", child=True)
        child.metrics(points(0, 20))
        assert child.finish("FINISHED").left == 0
    link = parent.view(study_view("demo", str(parent.run_id), 4))
    assert parent.finish("FINISHED").left == 0
    lines = "p => [...new Set((p.data || []).map(d => d.name))].sort()"
    script = f"[...document.querySelectorAll('.js-plotly-plot')].map({lines})"
    with browser.opened(link) as page:
        charts = page.until(script, lambda seen: len(seen) >= 2 and all(len(lines) == 4 for lines in seen))
        assert all(lines == sorted(names) for lines in charts)


# -- the trials of a sweep ---------------------------------------------------------------------------------------------

RATES, NETS = (0.01, 0.1, 1.0), ("plain-18", "plain-34", "resnet-18", "resnet-34")


def trial_of(folder: Path, uri: str, name: str, top1: float | None, params: dict[str, str]) -> None:
    """A child with a curve up to `top1`; None: one that failed before it was heard of."""
    tracker = opened(folder, uri, "digits", child=True, name=name, params=params, tags={"skiplane.kind": "trial"})
    for epoch in range(1, 7) if top1 is not None else ():
        value, stamp = (top1 or 0.0) * epoch / 6, (22 * epoch, 10**12 + epoch)
        tracker.metrics([Metric(key, value, *stamp) for key in ("val/top1", "val/top1_best")])
        tracker.metrics([Metric(key, 3.0 - value, *stamp) for key in ("train/loss", "val/loss")])
    tracker.tags({"skiplane.state": "failed" if top1 is None else "finished"})
    assert tracker.finish("FAILED" if top1 is None else "FINISHED").left == 0


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium to look at the page")
def test_saved_view_of_a_sweep_shows_all_trials_flat_and_best_first(tmp_path: Path, real: RealServer) -> None:
    """Zero clicks: twelve rows in their order, and what was varied beside the result. One trial failed; another has
    not got a parameter that the others vary."""
    parent = opened(tmp_path, real.uri, "digits", tags={"skiplane.kind": "sweep"})
    names = [f"{net} lr={rate:g}" for rate in RATES for net in NETS]
    tops = [(7 * number + 3) % 12 / 12 for number in range(11)]  # all unlike, in no order
    for name, top1 in zip(names, [*tops, None], strict=True):
        net, _, rate = name.partition(" lr=")
        params = {"model.depth": net[-2:], "optim.lr": rate}
        own = params if name != names[5] else {"optim.lr": rate}
        trial_of(tmp_path / f"t{names.index(name):03d}", real.uri, name, top1, own)
    view = sweep_view("s1", str(parent.run_id), ["model.depth", "optim.lr"], "val/top1", more_is_better=True, runs=12)
    link = parent.view(view)
    assert parent.finish("FINISHED").left == 0
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
