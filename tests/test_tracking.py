"""Tracking without a server: names, the outbox, the sender in outages, what a refused batch loses, links."""

import base64
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.tracking import Metric, NullTracker, address, sender, views
from orchestrator.tracking.outbox import MemoryOutbox
from orchestrator.tracking.records import File, Record, Status, Tags
from orchestrator.tracking.runs import MlflowTracker
from orchestrator.tracking.sender import Refused, Sender, Unreachable
from orchestrator.tracking.server import in_batches
from pipelines.errors import ClusterError, ConfigError


def point(step: int, key: str = "train/loss", value: float = 0.5) -> Metric:
    return Metric(key, value, step, 1000 + step)


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train/loss", "val/top-1", "a.b_c:d e", "x" * 250])
def test_good_metric_names(key: str) -> None:
    assert point(0, key).key == key


@pytest.mark.parametrize("key", ["", "a//b", "/a", "a/", "../a", "a/../b", ".", "top1%", "f(x)", "ä", "x" * 251])
def test_bad_metric_names_fail_at_birth(key: str) -> None:
    """MLflow would refuse the whole batch they are in."""
    with pytest.raises(ValueError, match="metric name"):
        point(0, key)


# -- outbox ------------------------------------------------------------------------------------------------------------


def test_outbox_keeps_records_until_done() -> None:
    outbox = MemoryOutbox()
    outbox.put([point(1), point(2), point(3)])
    assert outbox.peek(2, 0.0) == [point(1), point(2)]
    assert outbox.peek(2, 0.0) == [point(1), point(2)]  # a reader that died in between sees them again
    outbox.done(2)
    assert outbox.peek(2, 0.0) == [point(3)]
    assert len(outbox) == 1


def test_empty_outbox_gives_nothing_in_time() -> None:
    assert MemoryOutbox().peek(5, 0.0) == []


# -- sender ------------------------------------------------------------------------------------------------------------


class Receiver:
    """A server under the test's control: takes, refuses, is away, or hangs. Keeps every delivery, doubles and all."""

    def __init__(self) -> None:
        self.deliveries: list[list[Record]] = []
        self.answers: list[Callable[[], None]] = []  # what the next deliveries do; then all go well
        self.reached = threading.Event()

    def deliver(self, records: list[Record]) -> None:
        self.reached.set()
        if self.answers:
            self.answers.pop(0)()
        self.deliveries.append(records)

    @property
    def arrived(self) -> list[Record]:
        return [record for delivery in self.deliveries for record in delivery]


def fails(error: Exception) -> Callable[[], None]:
    def answer() -> None:
        raise error

    return answer


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "HURRIED_PAUSE_S"):
        monkeypatch.setattr(sender, name, 0.001)


def test_records_arrive_in_order_through_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    receiver, outbox = Receiver(), MemoryOutbox()
    receiver.answers = [fails(Unreachable("refused")) for _ in range(5)]
    thread = Sender(outbox, receiver.deliver, "MLflow")
    for step in range(100):
        outbox.put([point(step)])
    assert thread.close(30.0) == 0
    assert receiver.arrived == [point(step) for step in range(100)]
    assert [r.message.split(" (")[0] for r in caplog.records] == ["MLflow does not answer", "MLflow answers again"]


def test_batches_are_within_the_limit() -> None:
    receiver, outbox = Receiver(), MemoryOutbox()
    outbox.put([point(step) for step in range(2500)])
    assert Sender(outbox, receiver.deliver, "MLflow").close(30.0) == 0
    assert [len(d) for d in receiver.deliveries] == [1000, 1000, 500]


def test_refused_records_do_not_hold_up_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    receiver, outbox = Receiver(), MemoryOutbox()
    receiver.answers = [fails(Refused("bad param"))]
    thread = Sender(outbox, receiver.deliver, "MLflow")
    outbox.put([Tags({"a": "b"})])
    assert receiver.reached.wait(30)
    outbox.put([point(1)])
    assert thread.close(30.0) == 0
    assert receiver.arrived == [point(1)]
    assert "refused, and will not have: bad param" in caplog.text


def test_hanging_server_blocks_nobody() -> None:
    """The queue grows, the end of the run waits as long as it was told to, and what is left is counted."""
    receiver, outbox, hang = Receiver(), MemoryOutbox(), threading.Event()
    receiver.answers = [lambda: hang.wait(60) and None]
    thread = Sender(outbox, receiver.deliver, "MLflow")
    outbox.put([point(0)])
    assert receiver.reached.wait(30)
    outbox.put([point(step) for step in range(1, 50)])
    assert thread.close(0.05) == 50
    hang.set()


def test_answer_lost_means_sent_again() -> None:
    """At least once: the receiver drops doubles, because the same event has the same timestamp."""
    receiver, outbox = Receiver(), MemoryOutbox()

    def takes_and_dies() -> None:
        receiver.deliveries.append([point(1)])
        raise Unreachable("connection reset")

    receiver.answers = [takes_and_dies]
    outbox.put([point(1)])
    assert Sender(outbox, receiver.deliver, "MLflow").close(30.0) == 0
    assert receiver.arrived == [point(1), point(1)]
    assert set(receiver.arrived) == {point(1)}


# -- what a refused batch loses ----------------------------------------------------------------------------------------


@given(bad=st.sets(st.integers(0, 249), max_size=6), size=st.integers(1, 300))
def test_only_the_culprits_of_a_refused_batch_are_lost(bad: set[int], size: int) -> None:
    """A server takes a batch whole or not at all."""
    arrived: list[int] = []

    def send(part: list[int]) -> None:
        if culprits := bad & set(part):
            raise Refused(f"{min(culprits)}")
        arrived.extend(part)

    assert in_batches(send, list(range(250)), size) == [str(i) for i in sorted(bad)]
    assert arrived == [i for i in range(250) if i not in bad]


def test_nothing_to_send_is_not_sent() -> None:
    assert in_batches(lambda part: pytest.fail("sent"), [], 0) == []


# -- the tracker -------------------------------------------------------------------------------------------------------


class FakeServer:
    """Stands where the door to MLflow is."""

    shown, is_http = "http://h:5000", True

    def __init__(self) -> None:
        self.receiver = Receiver()

    def deliver(self, run_id: str, records: Sequence[Record]) -> None:
        self.receiver.deliver(list(records))


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def tracker(server: FakeServer) -> Iterator[MlflowTracker]:
    made = MlflowTracker(server, "7", "run1", {"train/loss": 20}, MemoryOutbox())  # type: ignore[arg-type]
    yield made
    made.finish("FINISHED", 0.0)


def test_resumed_steps_are_not_tracked_twice(server: FakeServer, tracker: MlflowTracker) -> None:
    """The run has points up to step 20; it goes on from its checkpoint at 10, dies at 30, and again from 20."""
    for first, last in ((10, 30), (20, 40)):
        for step in range(first, last + 1, 2):
            tracker.metrics([point(step), point(step, "val/loss")])
    assert tracker.finish("FINISHED", 30.0) == 0
    steps = {key: [r.step for r in server.receiver.arrived if isinstance(r, Metric) and r.key == key]
             for key in ("train/loss", "val/loss")}  # fmt: skip
    assert steps == {"train/loss": list(range(22, 41, 2)), "val/loss": list(range(10, 41, 2))}


def test_finish_is_the_last_word(server: FakeServer, tracker: MlflowTracker) -> None:
    tracker.metrics([point(30)])
    tracker.note("n" * 9000)
    tracker.file(b"<svg/>", "figures/a.svg")
    assert tracker.finish("KILLED", 30.0) == 0
    *before, last = server.receiver.arrived
    assert before == [point(30), Tags({"mlflow.note.content": "n" * 8000}), File("figures/a.svg", b"<svg/>")]
    assert isinstance(last, Status)
    assert last.status == "KILLED"


def test_a_table_is_a_file_and_the_tag_that_lists_it(server: FakeServer, tracker: MlflowTracker) -> None:
    tracker.table([{"a": 1, "b": "x"}], "one.json")
    tracker.table([{"a": 1, "b": "x"}, {"b": "y", "a": 2}], "one.json")
    tracker.table([{"c": None}], "two.json")
    tracker.finish("FINISHED", 30.0)
    files = [(r.name, json.loads(r.content)) for r in server.receiver.arrived if isinstance(r, File)]
    assert files[1:] == [
        ("one.json", {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}),
        ("two.json", {"columns": ["c"], "data": [[None]]}),
    ]
    tags = [r.values["mlflow.loggedArtifacts"] for r in server.receiver.arrived if isinstance(r, Tags)]
    assert json.loads(tags[1]) == [{"path": "one.json", "type": "table"}]
    assert json.loads(tags[2]) == [{"path": "one.json", "type": "table"}, {"path": "two.json", "type": "table"}]


def test_run_page(tracker: MlflowTracker) -> None:
    assert tracker.url == "http://h:5000/#/experiments/7/runs/run1"


def test_null_tracker_hears_everything() -> None:
    silent = NullTracker()
    silent.metrics([point(0)])
    silent.tags({"a": "b"})
    silent.note("")
    silent.file(b"", "f")
    silent.table([{"a": 1}], "f.json")
    assert (silent.view(views.study_view("v", [])), silent.run_id, silent.url, silent.finish("FINISHED")) == (
        None,
        None,
        None,
        0,
    )


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    ["http://h:5000", "https://h/mlflow", "sqlite:////a/b.db", "postgresql+psycopg://u:p@h/db", "mysql+pymysql://h/db"],
)
def test_usable_uris(uri: str) -> None:
    address.check(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("./mlruns", "tracking.uri is ./mlruns; use http"),
        ("file:///a/mlruns", "out of service"),
        ("sqlite:///mlflow.db", "an absolute path is needed"),
        ("databricks", "use http"),
        ("ftp://me:secret@h/x", "tracking.uri is ftp://h/x; use"),
    ],
)
def test_unusable_uris(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        address.check(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@h:5000/p", "http://h:5000/p"),
        ("postgresql+psycopg://me:s%40@h/db", "postgresql+psycopg://h/db"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("http://h", "http://h"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert address.without_password(uri) == shown


@pytest.mark.parametrize("scheme", ["http://me:secret@", "postgresql+psycopg://me:secret@"])
def test_port_nobody_listens_on(scheme: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterError, match=r"does not answer .*jobs\.local up") as caught:
            address.probe(f"{scheme}127.0.0.1:{closed.getsockname()[1]}")
    assert "secret" not in str(caught.value)


def test_silent_server_is_known_within_ten_seconds() -> None:
    """It takes the connection and says nothing, as a stopped process does. Ten seconds are the promise."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(ClusterError, match=r"does not answer \(timed out\)"):
            address.probe(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - began < 10


# -- views -------------------------------------------------------------------------------------------------------------


class Client:
    """Keeps the tags that a client sets."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        self.tags[f"{experiment_id} {key}"] = value


def test_saved_view_shows_loss_and_error_of_all_runs() -> None:
    client, runs = Client(), [f"{i:032x}" for i in range(12)]
    key = views.save(client, "3", views.study_view("demo", runs))
    (name, value), *_ = client.tags.items()
    assert name == f"3 mlflow.sharedViewState.{key}"
    view = json.loads(value)
    assert view["name"] == "demo"
    assert len(value) < 20_000  # what MLflow takes
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    assert state["searchFilter"] == f"attributes.run_id IN ({','.join(repr(r) for r in runs)})"
    assert state["runsHiddenMode"] == "SHOW_ALL"  # by default only ten are drawn
    assert [chart["metricKey"] for chart in state["compareRunCharts"]][:2] == ["train/loss", "val/error"]
    assert views.view_url("http://h/", "3", key).startswith("http://h/#/experiments/3/runs?viewStateShareKey=")


def test_view_of_the_same_runs_replaces_itself() -> None:
    client = Client()
    keys = {views.save(client, "3", views.study_view("demo", runs)) for runs in (["a", "b"], ["a", "b"], ["a"])}
    assert len(keys) == len(client.tags) == 2


def test_plain_link_names_the_runs() -> None:
    link = unquote(views.plain_url("http://h", "3", views.study_view("demo", ["a", "b"])))
    assert "searchFilter=attributes.run_id IN ('a','b')&orderByKey=metrics.`val/error`&orderByAsc=true" in link


def sweep(metric: str = "val/top1", runs: int = 12) -> views.View:
    return views.sweep_view(
        "s1", "p" * 32, ["model.depth", "optim.lr"], metric, more_is_better=metric != "val/loss", runs=runs
    )


def test_view_of_a_sweep_has_its_children_best_first() -> None:
    state = views.state(sweep())
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{'p' * 32}'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/top1_best`", False)
    assert state["selectedColumns"] == ["metrics.`val/top1_best`", "metrics.`val/top1`", "params.`model.depth`",
                                        "params.`optim.lr`", "tags.`skiplane.state`"]  # fmt: skip
    shown = [(chart["type"], chart["metricKey"]) for chart in state["compareRunCharts"]]
    assert shown == [("PARALLEL", "val/top1_best"), ("BAR", "val/top1_best"), ("LINE", "val/top1"),
                     ("LINE", "train/loss"), ("LINE", "val/loss")]  # fmt: skip
    parallel = state["compareRunCharts"][0]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (["model.depth", "optim.lr"], ["val/top1_best"])
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == 5


def test_view_of_a_sweep_by_loss_has_the_least_first() -> None:
    state = views.state(sweep("val/loss"))
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/loss`", True)
    assert state["selectedColumns"][:2] == ["metrics.`val/loss`", "params.`model.depth`"]


def test_view_of_a_sweep_is_as_small_for_a_thousand_trials() -> None:
    client = Client()
    assert views.save(client, "3", sweep(runs=12)) == views.save(client, "3", sweep(runs=1000))
    (value,) = client.tags.values()
    assert len(value) < 4_000
    assert all(chart["runsCountToCompare"] == 1000 for chart in views.state(sweep(runs=1000))["compareRunCharts"])


def test_plain_link_to_a_sweep() -> None:
    link = unquote(views.plain_url("http://h", "3", sweep()))
    assert f"searchFilter=tags.`mlflow.parentRunId` = '{'p' * 32}'&" in link
    assert link.endswith("orderByKey=metrics.`val/top1_best`&orderByAsc=false")
