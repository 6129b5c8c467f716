"""The process that sends journals: many runs in turn, outages said once, one run's trouble kept from the others; and
the real one over SQLite, killed in the middle and started again."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, outages, shipping
from orchestrator.tracking.failures import Unreachable, Unstored
from orchestrator.tracking.journal import Writer
from orchestrator.tracking.records import File, Open, Points, Record, Status, Tags, to_line
from orchestrator.tracking.server import Server
from orchestrator.tracking.shipping import Shipping
from orchestrator.tracking.verify import verify
from pipelines.errors import ClusterError, ConfigError
from tests.receivers import FakeServer, away

ROOT = Path(__file__).parent.parent
TEXT = "MLflow at http://h:5000 does not answer (connection refused)"


def point(step: int) -> Points:
    return Points(step, 1000 + step, {"train/loss": 1 / (1 + step)})


def opening(name: str, child: bool = False) -> Open:
    return Open(name, "digits", name, {}, {}, child=child)


class Bench:
    """A Shipping on a thread of its own over fake servers, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.servers = folder, {"http://h": FakeServer(), "http://other": FakeServer()}
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.shipping = Shipping(self.events.put, self.connect)
        self.thread = threading.Thread(target=self.shipping.run)
        self.connected: list[str] = []

    @property
    def server(self) -> FakeServer:
        return self.servers["http://h"]

    def connect(self, uri: str) -> FakeServer:
        self.connected.append(uri)
        return self.servers[uri]

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, *records: Record) -> Storage:
        storage = Storage(self.place(name))
        Writer(storage, 1).append([to_line(record) for record in records])
        return storage

    def order(self, do: str, name: str = "", uri: str = "http://h") -> None:
        place = {"place": self.place(name)} if name else {}
        self.shipping.order({"do": do, **place, **({"uri": uri} if do == "serve" else {})})

    def until(self, event: str, name: str = "", **fields: Any) -> list[dict[str, Any]]:
        """All that is told up to this event."""
        wanted = {"event": event, **({"place": self.place(name)} if name else {}), **fields}
        heard = [self.events.get(timeout=30)]
        while not wanted.items() <= heard[-1].items():
            heard.append(self.events.get(timeout=30))
        return heard


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "HURRIED_PAUSE_S"):
        monkeypatch.setattr(outages, name, 0.01)
    made = Bench(tmp_path)
    made.thread.start()
    yield made
    made.shipping.end()
    made.thread.join()


# -- one run -----------------------------------------------------------------------------------------------------------


def test_a_run_from_its_opening_to_its_end(bench: Bench) -> None:
    bench.write("a", opening("a"), point(0))
    bench.order("serve", "a")
    assert bench.until("shipped", "a", next=2) == [
        {"event": "shipped", "place": bench.place("a"), "next": 0, "refused": 0},
        {"event": "opened", "place": bench.place("a"), "experiment_id": "7", "run_id": "Ra"},
        {"event": "shipped", "place": bench.place("a"), "next": 2, "refused": 0},
    ]
    bench.write("a", point(1), Status("FINISHED", 9))
    bench.order("close", "a")
    bench.until("shipped", "a", next=4)
    assert [number for _, number, _ in bench.server.taken] == [1, 2, 3]


def test_a_journal_is_looked_at_when_somebody_says_so_and_not_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, read = list[int](), journal.read

    def looked(storage: Storage, start: int, lease: int | None) -> journal.Piece:
        looks.append(start)
        return read(storage, start, lease)

    monkeypatch.setattr(journal, "read", looked)
    bench.write("a", opening("a"), point(0))
    bench.write("b", opening("b"))
    bench.order("serve", "a")
    bench.until("shipped", "a", next=2)
    bench.order("serve", "b")
    bench.until("opened", "b")  # after another look at the first, who was before it in the line
    bench.write("a", point(1))
    bench.order("serve", "b")
    bench.until("shipped", "b", next=1)
    assert Counter(looks)[2] == 1
    bench.order("kick", "a")
    bench.until("shipped", "a", next=3)
    assert Counter(looks)[2] == 2


def test_what_was_closed_is_forgotten_when_all_is_sent(bench: Bench) -> None:
    bench.write("a", opening("a"))
    bench.order("serve", "a")
    bench.order("close", "a")
    bench.until("opened", "a")
    bench.write("b", opening("b"))
    bench.order("serve", "b")
    bench.until("opened", "b")
    bench.write("a", point(0))
    bench.order("kick", "a")  # of a run that is not known any more
    bench.order("serve", "b")
    bench.until("shipped", "b", next=1)
    assert bench.server.taken == []
    bench.order("serve", "a")
    bench.until("shipped", "a", next=2)


def test_refusals_are_told(bench: Bench) -> None:
    bench.server.refuses = lambda record: isinstance(record, Tags)
    bench.write("a", opening("a"), Tags({"x": "y"}), Tags({"x": "z"}), point(0))
    bench.order("serve", "a")
    shipped, refused = bench.until("refused", "a")[-2:]
    assert (shipped["next"], shipped["refused"]) == (4, 2)
    assert refused["text"] == (
        f"record 1 of {bench.place('a')} (I do not like it), and 1 more; see tracking/refused.jsonl there"
    )


def long_pauses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on nevertheless did not wait for a pause to end."""
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 3600.0)
    bench.shipping._outages._longest = 3600.0


# -- outages -----------------------------------------------------------------------------------------------------------


def test_an_outage_is_said_once_and_so_is_its_end(bench: Bench) -> None:
    bench.server.answers = [away] * 20
    for name in "abc":
        bench.write(name, opening(name), point(0))
        bench.order("serve", name)
        bench.order("close", name)
    sent, heard = set[str](), list[dict[str, Any]]()
    while len(sent) < 3:
        heard.append(bench.events.get(timeout=30))
        sent |= {heard[-1]["place"]} if heard[-1].get("next") == 2 else set()
    assert [event for event in heard if event["event"] in ("away", "back")] == [
        {"event": "away", "text": TEXT}, {"event": "back"}]  # fmt: skip


def test_a_server_that_is_away_is_asked_for_one_run_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hang: a request then takes its ten seconds, for each of a hundred runs."""
    long_pauses(bench, monkeypatch)
    bench.server.answers = [away] * 6  # who comes is tried at once
    for name in "abcdef":
        bench.write(name, opening(name))
        bench.order("serve", name)
    bench.write("elsewhere", opening("elsewhere"))
    bench.order("serve", "elsewhere", "http://other")
    bench.until("opened", "elsewhere")  # its server answers
    asked = bench.server.requests
    for name in "abcdef":
        bench.write(name, point(0))
        bench.order("kick", name)
    bench.write("elsewhere", point(0))
    bench.order("kick", "elsewhere")
    bench.until("shipped", "elsewhere", next=2)
    assert bench.server.requests == asked
    bench.server.answers.clear()
    bench.order("hurry")
    bench.until("back")


def test_storage_that_is_away_is_an_outage_of_that_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, names = set[str](), Storage.names

    def listed(storage: Storage, prefix: str = "") -> list[str]:
        if storage.place in gone:
            raise ClusterError("cluster.storage: a cannot be listed")
        return names(storage, prefix)

    monkeypatch.setattr(Storage, "names", listed)
    bench.write("a", opening("a"))
    bench.write("b", opening("b"))
    gone.add(bench.place("a"))
    bench.order("serve", "a")
    assert bench.until("away")[-1]["text"] == "cluster.storage: a cannot be listed"
    bench.order("serve", "b")
    bench.until("opened", "b")
    gone.clear()
    assert [event["place"] for event in bench.until("back") if event["event"] == "opened"] == [bench.place("a")]


def test_a_part_waits_for_the_run_above_and_then_goes_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    long_pauses(bench, monkeypatch)
    bench.write("s/t001", opening("t001", child=True))
    bench.order("serve", "s/t001")
    assert "waits for that in" in bench.until("away")[-1]["text"]
    bench.write("s", opening("s"))
    bench.order("serve", "s")
    bench.until("opened", "s/t001")
    assert bench.server.opened[-1][1] == "Rs"


class Choosy(FakeServer):
    """It does not answer some runs."""

    def __init__(self, *ill: str) -> None:
        super().__init__()
        self.ill, self.ill_asked = set(ill), 0

    def _asked(self, run_id: str) -> None:
        if run_id in self.ill:
            self.ill_asked += 1
            away()
        super()._asked(run_id)


def test_a_run_whose_requests_alone_fail_waits_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    long_pauses(bench, monkeypatch)
    server = bench.servers["http://h"] = Choosy("Ra")
    bench.write("a", opening("a"))
    bench.order("serve", "a")
    bench.until("away")
    bench.write("b", opening("b"))
    bench.order("serve", "b")
    bench.until("opened", "b")
    for step in range(10):
        bench.write("b", point(step))
        bench.order("kick", "b")
        assert {event["event"] for event in bench.until("shipped", "b", next=step + 2)} == {"shipped"}
    assert server.ill_asked == 2  # once more when the server answered another
    server.ill.clear()
    bench.order("hurry")
    assert [event["event"] for event in bench.until("opened", "a")] == ["opened"]
    bench.until("back")


def test_a_server_that_is_back_for_some_is_not_back(bench: Bench) -> None:
    """However often the others are served meanwhile, an outage is one."""
    server = bench.servers["http://h"] = Choosy("Ra", "Rb")
    for name in "abc":
        bench.write(name, opening(name))
        bench.order("serve", name)
    heard = bench.until("opened", "c")
    for step in range(20):
        asked = server.ill_asked
        bench.write("c", point(step))
        bench.order("kick", "c")
        heard += bench.until("shipped", "c", next=step + 2)
        while server.ill_asked == asked:
            time.sleep(0.001)
    server.ill.remove("Ra")
    heard += bench.until("opened", "a")
    assert [event["event"] for event in heard if event["event"] in ("away", "back")] == ["away"]
    server.ill.remove("Rb")
    assert "away" not in {event["event"] for event in bench.until("back")}


def test_files_that_cannot_be_stored_hold_up_that_run_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise Unstored("the disk is full")

    long_pauses(bench, monkeypatch)
    bench.server.answers = [lambda: None, full]
    bench.write("a", opening("a"), File("a.svg", "a" * 64))
    bench.order("serve", "a")
    assert bench.until("away")[-1]["text"] == "the disk is full"
    bench.write("b", opening("b"), point(0))
    bench.order("serve", "b")
    assert "back" not in {event["event"] for event in bench.until("shipped", "b", next=2)}
    bench.write("b", point(1))
    bench.order("kick", "b")
    bench.until("shipped", "b", next=3)
    bench.order("hurry")
    bench.until("shipped", "a", next=2)
    bench.until("back")


# -- runs that fail ----------------------------------------------------------------------------------------------------


def test_a_run_that_was_restored_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again now and then; that it fails is said once, and once more when it fails anew."""
    monkeypatch.setattr(shipping, "FAILED_S", 0.01)
    for following in (2, 3):
        bench.server.deleted = {"Ra"}
        bench.server.answers = [lambda: None, lambda: None, bench.server.deleted.clear]
        bench.write("a", *([opening("a")] if following == 2 else []), point(following))
        bench.order("serve" if following == 2 else "kick", "a")
        heard = bench.until("shipped", "a", next=following)
        assert [event["exit"] for event in heard if event["event"] == "failed"] == [2]


def test_a_run_that_cannot_be_opened_is_left_until_it_is_served_anew(bench: Bench) -> None:
    bench.server.deleted = {"Ra"}
    bench.write("a", opening("a"))
    bench.order("serve", "a")
    failed = bench.until("failed", "a")[-1]
    assert (failed["exit"], failed["text"]) == (2, "MLflow run Ra was deleted at http://h:5000; restore it")
    bench.write("b", opening("b"))
    bench.order("kick", "a")
    bench.order("serve", "b")
    bench.until("opened", "b")
    assert bench.server.requests == 2
    bench.server.deleted = set()
    bench.order("serve", "a")
    bench.until("opened", "a")


@pytest.mark.parametrize("fault", ["the server's address", "a bug"])
def test_whatever_one_run_does_the_others_go_on(bench: Bench, fault: str, capfd: pytest.CaptureFixture[str]) -> None:
    def bad() -> None:
        raise ZeroDivisionError("of http://h")

    if fault == "a bug":
        bench.server.answers = [bad]
    else:
        bench.servers["http://h"] = None  # type: ignore[assignment]
    bench.write("a", opening("a"))
    bench.order("serve", "a")
    failed = bench.until("failed", "a")[-1]
    assert failed["exit"] == 4
    assert failed["text"].startswith(f"the journal in {bench.place('a')} cannot be sent to MLflow (")
    bench.write("b", opening("b"))
    bench.order("serve", "b", "http://other")
    bench.until("opened", "b")
    assert "Traceback" in capfd.readouterr().err


def test_a_password_is_not_shown(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    uri = "http://me:secret@h"

    def bad() -> None:
        raise ZeroDivisionError(f"of {uri}")

    bench.servers[uri] = FakeServer(answers=[bad])
    bench.write("a", opening("a"))
    bench.order("serve", "a", uri)
    assert "secret" not in json.dumps(bench.until("failed", "a"))
    assert "secret" not in capfd.readouterr().err


def test_what_becomes_of_a_run_that_was_forgotten_is_not_told(bench: Bench) -> None:
    """Its place may be served anew by then."""
    ready, go = threading.Event(), threading.Event()

    def fails() -> None:
        ready.set()
        go.wait(30)
        raise ConfigError("it was deleted")

    bench.server.answers = [fails]
    bench.write("a", opening("a"))
    bench.order("serve", "a")
    assert ready.wait(30)
    bench.order("forget", "a")
    bench.order("serve", "a")
    go.set()
    assert [event["event"] for event in bench.until("opened", "a")] == ["shipped", "shipped", "opened"]


def test_a_server_that_cannot_be_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(uri: str) -> FakeServer:
        raise ConfigError("tracking.uri is ftp://h; use http") if uri == "ftp://h" else Unreachable(TEXT)

    monkeypatch.setattr(bench.shipping, "_server", connect)
    bench.write("a", opening("a"))
    bench.order("serve", "a", "ftp://h")
    assert bench.until("failed", "a")[-1]["exit"] == 2
    bench.order("serve", "a")
    bench.until("away")
    monkeypatch.setattr(bench.shipping, "_server", bench.connect)
    bench.until("back")


def test_runs_take_turns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred segments of one do not hold up another."""
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1)
    for name in "ab":
        writer = Writer(Storage(bench.place(name)), 1)
        for record in (opening(name), *map(point, range(20))):
            writer.append([to_line(record)])
    ready, go = threading.Event(), threading.Event()
    bench.server.answers = [lambda: (ready.set(), go.wait(30))[0]]
    bench.order("serve", "a")
    assert ready.wait(30)
    bench.order("serve", "b")
    go.set()
    bench.until("shipped", "b", next=21)
    runs = [run for run, _, _ in bench.server.taken]
    assert runs[1:39] == ["Ra", "Rb"] * 19


# -- the real process --------------------------------------------------------------------------------------------------

STEPS, AT_ONCE = 1000, 20


class Process:
    """`python -m orchestrator.tracking.shipping`, and what it tells."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "orchestrator.tracking.shipping"]
        self.popen = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def order(self, **said: str) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(json.dumps(said).encode() + b"\n")

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for line in self.popen.stdout or ():
            if wanted(event := json.loads(line)):
                return event
        raise AssertionError(f"it ended with {self.popen.wait()}")

    def end(self) -> int:
        """Closes its stdin, reads what it still tells; returns how it ended."""
        self.popen.communicate(timeout=60)
        return self.popen.returncode

    def kill(self) -> int:
        self.popen.kill()
        return self.end()


def values(step: int) -> dict[str, float]:
    """Every hundredth loss is none."""
    return {"train/loss": math.nan if step % 100 == 0 else 1 / (1 + step), "train/top1": step / 7}


def long_journal(storage: Storage) -> int:
    """Of many segments."""
    writer = Writer(storage, 1)
    writer.append([to_line(Open("id-1", "digits", "a", {"lr": "0.1"}, {}))])
    for first in range(0, STEPS, AT_ONCE):
        writer.append([to_line(Points(step, 10**12 + step, values(step))) for step in range(first, first + AT_ONCE)])
    writer.append([to_line(Status("FINISHED", 10**12 + STEPS))])
    return writer.next


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # of mlflow 3.17 with SQLAlchemy 2.1
def test_killed_in_the_middle_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times, at once after something arrived; nothing is missing then and nothing is there twice."""
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 4000)
    storage, uri = Storage(str(tmp_path / "run")), f"sqlite:///{tmp_path}/new/mlflow.db"
    records, runs = long_journal(storage), set[str]()
    for reached in (0, records // 4, records // 2):
        process = Process()
        process.order(do="serve", place=storage.place, uri=uri)
        if reached == 0:
            runs.add(process.until(lambda event: event["event"] == "opened")["run_id"])
        else:
            process.until(lambda event, reached=reached: event.get("next", 0) >= reached)
        process.kill()
        ack = journal.read_ack(storage)
        assert ack is None or ack.next < records
    process = Process()
    process.order(do="serve", place=storage.place, uri=uri)
    process.order(do="close", place=storage.place)
    process.until(lambda event: event.get("next", 0) == records)
    assert process.end() == 0
    verdict = verify(storage, server := Server(uri))
    assert (verdict.points, verdict.differences, verdict.standing.waiting) == (2 * STEPS, [], 0)
    (run,) = server.client.search_runs(["1"])
    assert ({run.info.run_id}, run.info.status) == (runs, "FINISHED")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_its_driver_and_not_by_a_signal(tmp_path: Path, number: int) -> None:
    """Ctrl-C reaches it too, and the SIGTERM of `ray job stop`: it goes on, for its driver decides. Its stdout holds
    events, whatever MLflow prints."""
    storage, uri = Storage(str(tmp_path / "run")), f"sqlite:///{tmp_path}/mlflow.db"
    Writer(storage, 1).append([to_line(Open("id-1", "digits", "a", {}, {}))])
    process = Process()
    process.order(do="serve", place=storage.place, uri=uri)
    process.until(lambda event: event["event"] == "shipped")
    os.kill(process.popen.pid, number)
    process.until(lambda event: event["event"] == "opened")
    assert process.end() == 0


ORPHAN = """
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-m", "orchestrator.tracking.shipping"], stdin=int(sys.argv[1]))
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_it_ends_with_a_driver_that_died_although_its_orders_are_held_open(tmp_path: Path) -> None:
    """Somebody else has the other end of the pipe, as a process may that the driver started."""
    storage, uri = Storage(str(tmp_path / "run")), f"sqlite:///{tmp_path}/mlflow.db"
    Writer(storage, 1).append([to_line(Open("id-1", "digits", "a", {}, {}))])
    reading, writing = os.pipe()
    os.write(writing, json.dumps({"do": "serve", "place": storage.place, "uri": uri}).encode() + b"\n")
    command = [sys.executable, "-c", ORPHAN, str(reading)]
    driver = subprocess.Popen(command, cwd=ROOT, pass_fds=[reading], stdout=subprocess.PIPE)
    assert driver.stdout
    shipper = psutil.Process(int(driver.stdout.readline()))
    try:
        while journal.read_ack(storage) is None:
            assert shipper.is_running()
            time.sleep(0.05)
        driver.kill()
        shipper.wait(60)
    finally:
        driver.communicate()
        os.close(reading)
        os.close(writing)
