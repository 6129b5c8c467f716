"""The driver's handle on the process that sends: started again when it dies, told anew, never waited for."""

import logging
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.tracking import shipper as module
from orchestrator.tracking.shipper import Shipper
from pipelines.errors import ClusterError, ConfigError

# What it hears goes into a file; what it says is what the test puts into another, a line at a time.
STUB = """
import json, os, sys, time
heard, said = sys.argv[1:]
with open(heard, "a") as file:
    print(json.dumps({"pid": os.getpid()}), file=file, flush=True)
    for line in sys.stdin:
        file.write(line)
        file.flush()
        order = json.loads(line)
        if order["do"] == "kick":
            with open(said) as answers:
                sys.stdout.write(answers.read())
                sys.stdout.flush()
"""


class Stub:
    """The process as a test sees it."""

    def __init__(self, folder: Path) -> None:
        self.heard_file, self.said_file, script = folder / "heard", folder / "said", folder / "stub.py"
        script.write_text(textwrap.dedent(STUB))
        self.heard_file.touch()
        self.said_file.touch()
        self.shipper = Shipper((sys.executable, str(script), str(self.heard_file), str(self.said_file)))

    @property
    def heard(self) -> list[str]:
        return self.heard_file.read_text().splitlines()

    @property
    def pids(self) -> list[int]:
        return [int(line.split(": ")[1].rstrip("}")) for line in self.heard if line.startswith('{"pid"')]

    def until(self, holds: "object") -> None:
        limit = time.monotonic() + 60
        while not holds():  # type: ignore[operator]
            assert time.monotonic() < limit, self.heard
            time.sleep(0.01)

    def says(self, *events: str) -> None:
        """Answers to the next kick."""
        self.said_file.write_text("".join(event + "\n" for event in events))


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    made = Stub(tmp_path)
    made.until(lambda: made.pids)
    yield made
    made.shipper.end()


def test_what_it_says_is_known(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    served = stub.shipper.serve("/runs/a", "http://h")
    stub.says(
        '{"event": "away", "text": "MLflow at http://h does not answer"}', '{"event": "back"}',
        '{"event": "opened", "place": "/runs/a", "experiment_id": "7", "run_id": "r"}',
        '{"event": "refused", "place": "/runs/a", "text": "a bad name"}',
        '{"event": "shipped", "place": "/runs/a", "next": 12, "refused": 1}',
        '{"event": "shipped", "place": "/runs/other", "next": 99, "refused": 0}',
    )  # fmt: skip
    stub.shipper.kick("/runs/a")
    assert stub.shipper.wait(lambda: served.next, 60)
    assert (served.opened, served.experiment_id, served.run_id, served.next, served.refused) == (True, "7", "r", 12, 1)
    assert stub.shipper.away is None
    assert [record.message for record in caplog.records] == [
        "MLflow at http://h does not answer; training goes on, points wait in the journal", "MLflow answers again",
        "MLflow refused, and will not have: a bad name",
    ]  # fmt: skip


def test_what_is_sent_to_its_end_is_forgotten(stub: Stub) -> None:
    served = stub.shipper.serve("/runs/a", "http://h")
    stub.shipper.close("/runs/a", 12)
    for number in (11, 12):
        stub.says(f'{{"event": "shipped", "place": "/runs/a", "next": {number}, "refused": 0}}')
        stub.shipper.kick("/runs/a")
        assert stub.shipper.wait(lambda number=number: served.next == number, 60)
        assert served.sent == (number == 12)
    os.kill(stub.pids[0], signal.SIGKILL)
    stub.until(lambda: len(stub.pids) == 2)
    stub.shipper.serve("/runs/b", "http://h")
    stub.until(lambda: "/runs/b" in stub.heard[-1])
    assert stub.heard[-2].startswith('{"pid"')  # told of nothing else


@pytest.mark.parametrize(("code", "error"), [(2, ConfigError), (4, ClusterError)])
def test_a_run_that_cannot_be_opened_is_an_error_with_its_code(stub: Stub, code: int, error: type[Exception]) -> None:
    served = stub.shipper.serve("/runs/a", "http://h")
    served.check()
    stub.says(f'{{"event": "failed", "place": "/runs/a", "exit": {code}, "text": "it was deleted"}}')
    stub.shipper.kick("/runs/a")
    assert stub.shipper.wait(lambda: served.failed, 60)
    with pytest.raises(error, match="it was deleted"):
        served.check()
    stub.says('{"event": "opened", "place": "/runs/a", "experiment_id": "7", "run_id": "r"}')  # it was restored
    stub.shipper.kick("/runs/a")
    assert stub.shipper.wait(lambda: served.opened, 60)
    served.check()


def test_it_is_started_again_and_told_all_that_still_holds(stub: Stub) -> None:
    for place in ("/runs/a", "/runs/b", "/runs/c"):
        stub.shipper.serve(place, "http://h")
    stub.shipper.close("/runs/b", 10)
    stub.shipper.forget("/runs/c")
    stub.shipper.hurry()
    stub.until(lambda: '{"do": "hurry"}' in stub.heard)
    os.kill(stub.pids[0], signal.SIGKILL)
    stub.until(lambda: len(stub.pids) == 2 and stub.heard[-1] == '{"do": "hurry"}')
    again = stub.heard[stub.heard.index(f'{{"pid": {stub.pids[1]}}}') + 1 :]
    assert again == [
        '{"do": "serve", "place": "/runs/a", "uri": "http://h"}',
        '{"do": "serve", "place": "/runs/b", "uri": "http://h"}', '{"do": "close", "place": "/runs/b"}',
        '{"do": "hurry"}',
    ]  # fmt: skip


def test_one_that_stands_still_holds_nobody_up_and_is_replaced(stub: Stub) -> None:
    """A pipe takes 64 kB: then orders would wait for a process that does not read them."""
    stub.shipper.serve("/runs/a", "http://h")
    stub.until(lambda: len(stub.heard) == 2)
    os.kill(stub.pids[0], signal.SIGSTOP)
    kick = stub.shipper.kick  # again and again: it may have read some before it stood still
    stub.until(lambda: [kick("/runs/a") for _ in range(500)] and len(stub.pids) == 2)
    stub.until(lambda: stub.heard[-1] != f'{{"pid": {stub.pids[1]}}}')


def test_what_is_no_event_is_said_and_the_rest_goes_on(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    served = stub.shipper.serve("/runs/a", "http://h")
    stub.says("some library says hello", '{"event": "shipped", "place": "/runs/a", "next": 3, "refused": 0}')
    stub.shipper.kick("/runs/a")
    assert stub.shipper.wait(lambda: served.next == 3, 60)
    assert "some library says hello" in caplog.text
    assert len(stub.pids) == 1


def test_a_machine_without_processes_to_give_is_asked_again(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.01)
    start, fails = module.subprocess.Popen, iter(range(3))

    def short(*args: object, **more: object) -> object:
        if next(fails, None) is not None:
            raise BlockingIOError("Resource temporarily unavailable")
        return start(*args, **more)

    monkeypatch.setattr(module.subprocess, "Popen", short)
    os.kill(stub.pids[0], signal.SIGKILL)
    stub.until(lambda: len(stub.pids) == 2)
    assert caplog.text.count("cannot be started") == 3


def test_it_ends_with_its_driver(stub: Stub) -> None:
    stub.shipper.end()
    with pytest.raises(ProcessLookupError):
        os.kill(stub.pids[0], 0)
