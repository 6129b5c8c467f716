"""The driver's side of tracking: what reaches the journal, what is waited for, what is left. No server, no process."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.state.storage import Storage
from orchestrator.tracking import Metric, Place, Shipped, add_last, journal, left, open_tracker, recorder
from orchestrator.tracking import look_for_server as look
from orchestrator.tracking import tracker as module
from orchestrator.tracking.journal import Ack, write_ack
from orchestrator.tracking.records import (
    ExperimentTag,
    File,
    Model,
    Open,
    Points,
    Record,
    Status,
    Tags,
    Tracker,
    from_line,
)
from orchestrator.tracking.shipper import Served
from orchestrator.tracking.views import study_view
from pipelines.errors import ClusterError, ConfigError

URI = "http://user:secret@h:5000"


class Shipper:
    """Stands where the process is: what it would say is decided by a test."""

    def __init__(self) -> None:
        self.away: str | None = None
        self.orders = list[tuple[str, ...]]()
        self.known = dict[str, Served]()
        self.opens: Callable[[str, Served], None] = self.takes

    def takes(self, place: str, served: Served) -> None:
        """A server that has all that is in the journal, now and later."""
        served.opened, served.experiment_id, served.run_id = True, "7", "run1"
        served.next = 10**9

    def serve(self, place: str, uri: str) -> Served:
        self.orders.append(("serve", place))
        served = self.known[place] = Served(uri)
        self.opens(place, served)
        return served

    def kick(self, place: str) -> None:
        pass

    def close(self, place: str, records: int) -> None:
        self.orders.append(("close", place))
        self.known[place].records = records

    def forget(self, place: str) -> None:
        self.orders.append(("forget", place))

    def hurry(self) -> None:
        self.orders.append(("hurry",))

    def wait(self, until: Callable[[], Any], timeout_s: float) -> bool:
        return bool(until())


@pytest.fixture
def shipper(monkeypatch: pytest.MonkeyPatch) -> Shipper:
    made = Shipper()
    for name in (module, left):
        monkeypatch.setattr(name, "shipper", lambda: made)
    monkeypatch.setattr(recorder, "FOLDER_S", 0.0)
    return made


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "runs" / "a"))


def opened(storage: Storage, lease: int = 1, uri: str = URI, **more: Any) -> Tracker:
    return open_tracker(Place(storage, lease), uri, "digits", "a", id="i" * 32, params={"lr": "0.1"}, tags={}, **more)


def points(first: int, last: int, *keys: str) -> list[Metric]:
    return [Metric(key, step / 8, step, 1000 + step) for step in range(first, last) for key in keys or ("train/loss",)]


def records(storage: Storage) -> list[Record]:
    return [from_line(line) for _, line in journal.lines(storage)]


def steps(storage: Storage, key: str) -> list[int]:
    return [r.step for r in records(storage) if isinstance(r, Points) and key in r.values]


# -- what the journal gets ---------------------------------------------------------------------------------------------


def test_a_run_begins_with_what_it_is_and_ends_with_its_status(shipper: Shipper, storage: Storage) -> None:
    tracker = opened(storage)
    tracker.metrics([Metric("train/loss", 0.5, 3, 1003), Metric("train/top1", 0.25, 3, 1003)])
    tracker.note("n" * 9000)
    tracker.model("checkpoints/step-3", "net", "best")
    tracker.file(b"<svg/>", "figures/a.svg")
    shipped = tracker.finish("KILLED")
    first, *between, status, model = records(storage)
    assert isinstance(first, Open)
    assert (first.id, first.experiment, first.name, first.params, first.child) == (
        "i" * 32, "digits", "a", {"lr": "0.1"}, False)  # fmt: skip
    assert first.tags["mlflow.source.type"] == "JOB"
    assert isinstance(between[2], File)
    assert storage.read(f"tracking/files/{between[2].sha256}") == b"<svg/>"
    assert between[:2] == [
        Points(3, 1003, {"train/loss": 0.5, "train/top1": 0.25}), Tags({"mlflow.note.content": "n" * 8000}),
    ]  # fmt: skip
    assert isinstance(status, Status)
    assert status.status == "KILLED"
    assert model == Model("checkpoints/step-3", "net", "best")  # after the end: uploading takes a while
    assert shipped.records == 6


def test_steps_that_are_done_again_are_not_tracked_again(shipper: Shipper, storage: Storage) -> None:
    """The driver is killed after step 20, another goes on from the checkpoint at 10; its workers die at 30, go on
    from 20. A curve that was not there before begins where it begins."""
    first = opened(storage)
    first.metrics(points(0, 21))
    first.finish(None)
    again = opened(storage, lease=2)
    for begin, end in ((10, 31), (20, 41)):
        for step in range(begin, end):
            again.metrics(points(step, step + 1, "train/loss", "val/loss"))
    again.finish("FINISHED")
    assert steps(storage, "train/loss") == list(range(41))
    assert steps(storage, "val/loss") == list(range(10, 41))


def test_a_table_is_a_file_and_the_tag_that_lists_it(shipper: Shipper, storage: Storage) -> None:
    tracker = opened(storage)
    tracker.table([{"a": 1, "b": "x"}], "one.json")
    tracker.table([{"a": 1, "b": "x"}, {"b": "y", "a": 2}], "one.json")
    tracker.table([{"c": None}], "two.json")
    tracker.finish("FINISHED")
    files = [r for r in records(storage) if isinstance(r, File)]
    contents = [json.loads(storage.read(f"tracking/files/{r.sha256}") or b"") for r in files]
    assert [r.name for r in files] == ["one.json", "one.json", "two.json"]
    assert contents[1:] == [
        {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}, {"columns": ["c"], "data": [[None]]},
    ]  # fmt: skip
    tags = [r.values["mlflow.loggedArtifacts"] for r in records(storage) if isinstance(r, Tags)]
    assert json.loads(tags[2]) == [{"path": "one.json", "type": "table"}, {"path": "two.json", "type": "table"}]


def test_a_storage_that_fails_is_tried_again_and_holds_nobody_up(
    shipper: Shipper, storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.0)
    tracker, write, full = opened(storage), Storage.write, threading.Event()
    fails = iter(range(3))

    def failing(self: Storage, name: str, data: bytes) -> None:
        if full.is_set() and next(fails, None) is not None:
            raise ClusterError("no space left")
        write(self, name, data)

    monkeypatch.setattr(Storage, "write", failing)
    full.set()
    tracker.metrics(points(0, 5))
    assert tracker.finish("FINISHED").records == 7
    assert steps(storage, "train/loss") == list(range(5))
    assert [r.message.partition(" (")[0] for r in caplog.records] == ["the tracking journal cannot be written"]


def test_a_storage_that_hangs_holds_nobody_up_either(
    shipper: Shipper, storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The write does not return before the test has put more points, and closed in vain."""
    tracker, write, reached, answers = opened(storage), Storage.write, threading.Event(), threading.Event()

    def hanging(self: Storage, name: str, data: bytes) -> None:
        reached.set()
        assert answers.wait(60)
        write(self, name, data)

    monkeypatch.setattr(Storage, "write", hanging)
    monkeypatch.setattr(module, "WRITE_S", 0.01)
    tracker.metrics(points(0, 1))
    assert reached.wait(60)
    tracker.metrics(points(1, 5))
    lost = tracker.finish("KILLED")
    answers.set()
    assert lost.records < 7  # the write that hangs, and what came after it
    assert "could not be written" in caplog.text


# -- links -------------------------------------------------------------------------------------------------------------


def test_links_have_no_password(shipper: Shipper, storage: Storage) -> None:
    tracker = opened(storage)
    assert (tracker.run_id, tracker.url) == (
        "run1",
        "http://h:5000/#/experiments/7/runs/run1?workflowType=machine_learning",
    )
    link = tracker.view(study_view("demo", "run1", 4))
    assert link is not None
    assert link.startswith("http://h:5000/#/experiments/7/runs?viewStateShareKey=")
    tracker.finish("FINISHED")
    (tag,) = [r for r in records(storage) if isinstance(r, ExperimentTag)]
    assert tag.key.removeprefix("mlflow.sharedViewState.") in link


def test_a_database_has_no_pages(shipper: Shipper, storage: Storage) -> None:
    tracker = opened(storage, uri="sqlite:////a/mlflow.db")
    assert (tracker.run_id, tracker.url, tracker.view(study_view("demo", "run1", 4))) == ("run1", None, None)


# -- servers that are away ---------------------------------------------------------------------------------------------


def is_away(shipper: Shipper) -> None:
    shipper.away = "MLflow at http://h:5000 does not answer"
    shipper.opens = lambda place, served: None


def test_a_new_run_needs_its_server_and_leaves_nothing_without(shipper: Shipper, storage: Storage) -> None:
    is_away(shipper)
    with pytest.raises(ClusterError, match=r"MLflow at http://h:5000 does not answer; look at the server, or set "
                                           r"tracking\.uri \('offline' keeps a journal"):  # fmt: skip
        opened(storage)
    assert storage.names() == []
    assert shipper.orders[-1] == ("forget", storage.place)


def test_a_run_that_is_known_goes_on_without_its_server(shipper: Shipper, storage: Storage) -> None:
    opened(storage).finish("KILLED")
    write_ack(storage, Ack("http://h:5000", "7", "run1", 2))
    is_away(shipper)
    again = opened(storage, lease=2)
    again.metrics(points(0, 3))
    assert (again.run_id, again.url) == (
        "run1",
        "http://h:5000/#/experiments/7/runs/run1?workflowType=machine_learning",
    )
    assert again.finish("FINISHED") == Shipped(7, 2, 0)  # what was there before counts


@pytest.mark.parametrize(("status", "waits"), [("FINISHED", True), ("FAILED", True), ("KILLED", False)])
def test_who_was_told_to_stop_does_not_wait_for_a_server_that_is_away(
    shipper: Shipper, storage: Storage, status: str, waits: bool
) -> None:
    shipper.opens = lambda place, served: setattr(served, "opened", True)
    tracker = opened(storage)
    shipper.away = "MLflow at http://h:5000 does not answer"
    gave_up = list[bool]()
    shipper.wait = lambda until, timeout_s: gave_up.append(bool(until())) or False  # type: ignore[method-assign]
    assert tracker.finish(status).left == 2
    assert gave_up == [not waits]  # asked once: nothing moves


def test_the_end_waits_as_long_as_something_arrives(shipper: Shipper, storage: Storage) -> None:
    """And four times as long for a model, which is one record."""
    shipper.opens = lambda place, served: setattr(served, "opened", True)
    tracker, waited = opened(storage, wait_s=2.0), list[float]()
    tracker.metrics(points(0, 3))
    tracker.model("checkpoints/step-3")

    def arrives(until: Callable[[], Any], timeout_s: float) -> bool:
        waited.append(timeout_s)
        shipper.known[storage.place].next += 2
        return bool(until())

    shipper.wait = arrives  # type: ignore[method-assign]
    assert tracker.finish("FINISHED") == Shipped(6, 6, 0)
    assert waited == [2.0, 2.0, 2.0]
    again = opened(storage, lease=2, wait_s=2.0)
    again.model("checkpoints/step-4")
    shipper.known[storage.place].next = 8
    shipper.wait = lambda until, timeout_s: waited.append(timeout_s) or False  # type: ignore[method-assign]
    assert again.finish("FINISHED").left == 1
    assert waited[-1] == 8.0


def test_a_part_of_a_study_begins_without_its_server_and_does_not_wait_at_its_end(
    shipper: Shipper, storage: Storage
) -> None:
    is_away(shipper)
    tracker = opened(storage, child=True)
    assert (tracker.run_id, tracker.url) == (None, None)
    assert tracker.finish("FINISHED").left == 2
    assert ("hurry",) not in shipper.orders  # the next run goes on meanwhile


@pytest.mark.parametrize(("code", "error"), [(2, ConfigError), (4, ClusterError)])
def test_what_cannot_be_opened_is_refused_and_a_new_run_leaves_nothing(
    shipper: Shipper, storage: Storage, code: int, error: type[Exception]
) -> None:
    def refuses(place: str, served: Served) -> None:
        served.failed = (code, "tracking.experiment 'digits' was deleted")

    shipper.opens = refuses
    with pytest.raises(error, match=r"tracking\.experiment 'digits' was deleted"):
        opened(storage)
    assert storage.names() == []


def test_a_journal_that_was_there_before_is_kept(shipper: Shipper, storage: Storage) -> None:
    opened(storage).finish("KILLED")
    shipper.opens = lambda place, served: setattr(served, "failed", (2, "run run1 was deleted"))
    with pytest.raises(ConfigError, match="was deleted"):
        opened(storage, lease=2)
    assert len(records(storage)) == 3


# -- without a server --------------------------------------------------------------------------------------------------


def test_off_keeps_nothing_and_offline_a_journal(shipper: Shipper, storage: Storage) -> None:
    assert opened(storage, uri="off").finish("FINISHED") == Shipped()
    assert storage.names() == []
    tracker = opened(storage, uri="offline")
    tracker.metrics(points(0, 3))
    assert (tracker.run_id, tracker.url, tracker.view(study_view("demo", "p", 4))) == (None, None, None)
    assert tracker.finish("FINISHED") == Shipped(5, 0, 0)
    assert steps(storage, "train/loss") == [0, 1, 2]
    assert shipper.orders == []


def test_who_is_looked_for(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(module, "probe", asked.append)
    look(storage, "off")
    look(storage, "offline")
    look(storage, "http://h", child=True)
    assert asked == []
    look(storage, "http://h")
    assert asked == ["http://h"]
    journal.Writer(storage, 1).append([b"{}\n"])
    look(storage, "http://h")  # known: it goes on without
    assert asked == ["http://h"]
    with pytest.raises(ConfigError, match=r"tracking\.uri is \./mlruns"):
        look(storage, "./mlruns")


# -- what others write -------------------------------------------------------------------------------------------------


def test_last_words_for_a_run_that_nobody_has(shipper: Shipper, storage: Storage) -> None:
    add_last(Place(storage, 1), "FAILED", {"skiplane.state": "failed"})
    assert storage.names() == []  # it never began
    opened(storage).finish("FINISHED")
    add_last(Place(storage, 2), "FAILED", {"skiplane.state": "failed"})
    *_, tags, status = records(storage)
    assert tags == Tags({"skiplane.state": "failed"})
    assert isinstance(status, Status)
    assert status.status == "FAILED"


def test_a_journal_that_another_process_sends(shipper: Shipper, storage: Storage) -> None:
    """A trial's: its driver records, and knows its run once the sweep's driver has sent the beginning."""
    tracker = opened(storage, child=True, sends=False)
    assert (tracker.run_id, tracker.url, shipper.orders) == (None, None, [])
    write_ack(storage, Ack("http://h:5000", "7", "run1", 1))
    assert tracker.finish("FINISHED") == Shipped(2, 1, 0)
    assert tracker.run_id == "run1"
    assert str(tracker.url).startswith("http://h:5000/#/experiments/7/runs/run1?")


def test_others_are_followed_while_they_write_and_sent_to_their_end(
    shipper: Shipper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left, "FOLDER_S", 0.001)
    first, second, third, fourth = (Storage(str(tmp_path / f"t{number:03d}")) for number in range(1, 5))
    shipper.opens = lambda place, served: None
    others, looked = left.Others(URI), threading.Event()
    shipper.kick = lambda place: looked.set() if place == first.place else None  # type: ignore[method-assign]
    for storage in (first, second, third):
        opened(storage, child=True, sends=False).finish("FINISHED")
    others.follow(first)
    others.follow(first)  # the next part of a trial
    assert looked.wait(60)
    others.complete(first)
    write_ack(second, Ack("http://h:5000", "7", "run1", 2))
    assert others.end([first, second, third, fourth], 1.0) == Shipped(4, 0, 0)  # second has been sent; fourth is empty
    assert shipper.orders == [
        ("serve", first.place), ("close", first.place), ("close", first.place),
        ("serve", third.place), ("close", third.place),
    ]  # fmt: skip


def test_nobody_is_followed_offline(shipper: Shipper, storage: Storage) -> None:
    others = left.Others("offline")
    opened(storage, uri="offline").finish("FINISHED")
    others.follow(storage)
    others.complete(storage)
    assert others.end([storage], 1.0) == Shipped()
    assert shipper.orders == []
