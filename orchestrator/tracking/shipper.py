"""The driver's handle on the process that sends journals to MLflow: started when it is needed, and again when it dies.

That process is `orchestrator/tracking/shipping.py`. One serves all runs of a driver: importing MLflow takes 2 s and
250 MB.
"""

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.errors import ClusterError, ConfigError

ROOT = Path(__file__).parent.parent.parent
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before it is started again
HEALTHY_S = 60.0  # after which a death is not one of a row
END_S = 1.0  # that it has for the request under way, when the driver ends

log = logging.getLogger("skiplane.tracking")


@dataclass
class Served:
    """What is known of a run that is sent."""

    uri: str
    records: int | None = None  # in its journal, once that is complete
    experiment_id: str | None = None
    run_id: str | None = None
    opened: bool = False  # whether this submission is known to the server
    failed: tuple[int, str] | None = None  # (exit code, why it cannot be opened)
    next: int = 0
    refused: int = 0

    @property
    def sent(self) -> bool:
        """Whether nothing is left, and nothing more comes."""
        return self.records is not None and self.next >= self.records

    def check(self) -> None:
        """Raises ConfigError or ClusterError where the run cannot be opened."""
        if self.failed:
            code, text = self.failed
            raise (ConfigError if code == ConfigError.exit_code else ClusterError)(text)


class Shipper:
    """The process, and what it said. Nothing here waits for a server but `wait`."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-m", "orchestrator.tracking.shipping")) -> None:
        self._command = command
        self._runs = dict[str, Served]()
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self.away: str | None = None  # why the server does not take anything
        self._hurry = False
        self._thread = threading.Thread(target=self._live, name="skiplane-shipper", daemon=True)
        self._thread.start()

    def serve(self, place: str, uri: str) -> Served:
        """Sends the journal in `place` from now on, from where that has been acknowledged."""
        with self._changed:
            served = self._runs[place] = Served(uri)
            self._tell({"do": "serve", "place": place, "uri": uri})
            return served

    def kick(self, place: str) -> None:
        """There is more in a journal."""
        with self._changed:
            self._tell({"do": "kick", "place": place})

    def close(self, place: str, records: int) -> None:
        """A journal is complete, with so many records: it is sent to its end, and then forgotten."""
        with self._changed:
            if served := self._runs.get(place):
                served.records = records
                self._tell({"do": "close", "place": place})
                if served.sent:
                    self._runs.pop(place)

    def forget(self, place: str) -> None:
        """A journal is not to be sent any further."""
        with self._changed:
            if self._runs.pop(place, None):
                self._tell({"do": "forget", "place": place})

    def hurry(self) -> None:
        """The driver has nothing else to do any more: pauses are short from now on."""
        with self._changed:
            self._hurry = True
            self._tell({"do": "hurry"})

    def wait(self, until: Callable[[], Any], timeout_s: float) -> bool:
        """Until something that was heard makes `until` true; False where it does not in time."""
        with self._changed:
            return bool(self._changed.wait_for(until, timeout_s))

    def end(self) -> None:
        """Ends the process, after the request under way."""
        with self._changed:
            self._ended.set()
            self._changed.notify_all()
            process = self._process
            if process and process.stdin:
                process.stdin.close()
        self._thread.join(END_S)
        if process:
            process.kill()
        self._thread.join()

    # -- its life ------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        pause = FIRST_PAUSE_S
        began = time.monotonic()
        while process := self._start():
            for line in process.stdout or ():
                self._hear(line)
            code = self._bury(process)
            if self._ended.is_set():
                return
            pause = FIRST_PAUSE_S if time.monotonic() - began > HEALTHY_S else min(2 * pause, LONGEST_PAUSE_S)
            log.warning("the process that sends to MLflow ended (%s); another is started in %.0f s", code, pause)
            self._ended.wait(pause)
            began = time.monotonic()

    def _start(self) -> "subprocess.Popen[bytes] | None":
        """None once it has been ended. Tried until it goes: a machine may be short of processes for a while."""
        with self._changed:
            while not self._ended.is_set():
                try:
                    self._process = subprocess.Popen(
                        self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
                    )
                except OSError as error:
                    log.warning("what sends to MLflow cannot be started (%s); points wait in the journal", error)
                    self._changed.wait(LONGEST_PAUSE_S)
                    continue
                os.set_blocking(self._orders(self._process), False)
                self._greet()
                return self._process
        return None

    def _greet(self) -> None:
        """Tells a new process all that holds; with the lock held."""
        for place, served in self._runs.items():
            self._tell({"do": "serve", "place": place, "uri": served.uri})
            if served.records is not None:
                self._tell({"do": "close", "place": place})
        if self._hurry:
            self._tell({"do": "hurry"})

    def _bury(self, process: "subprocess.Popen[bytes]") -> int:
        """Its exit code."""
        with self._changed, process:  # closes its pipes
            self._process, self.away = None, None  # the next one finds out for itself
        return process.returncode

    def _tell(self, order: dict[str, str]) -> None:
        """With the lock held. What a dead process does not hear, the next one is told anew; and one that has not read
        its orders for so long that the pipe is full counts as dead."""
        if self._process is None:
            return
        try:
            os.write(self._orders(self._process), json.dumps(order).encode() + b"\n")
        except BlockingIOError:
            self._process.kill()
        except (OSError, ValueError):  # it has ended
            pass

    @staticmethod
    def _orders(process: "subprocess.Popen[bytes]") -> int:
        assert process.stdin is not None
        return process.stdin.fileno()

    def _hear(self, line: bytes) -> None:
        try:
            said = json.loads(line)
        except ValueError:  # what some library prints is no event
            log.warning("the process that sends to MLflow says: %r", line[:200])
            return
        with self._changed:
            self._note(said["event"], said, self._runs.get(said.get("place", "")))
            self._changed.notify_all()

    def _note(self, event: str, said: dict[str, Any], served: Served | None) -> None:
        if event == "away":
            self.away = said["text"]
            log.warning("%s; training goes on, points wait in the journal", said["text"])
        elif event == "back":
            self.away = None
            log.warning("MLflow answers again")
        elif served and event == "opened":
            served.experiment_id, served.run_id, served.opened = said["experiment_id"], said["run_id"], True
            served.failed = None  # it was restored
        elif served and event == "failed":
            served.failed = (said["exit"], said["text"])
            log.warning("%s", said["text"])
        elif served and event == "shipped":
            served.next, served.refused = said["next"], said["refused"]
            if served.sent:
                self._runs.pop(said["place"])
        elif event == "refused":
            log.warning("MLflow refused, and will not have: %s", said["text"])


@cache
def shipper() -> Shipper:
    """This process's own, started by the first who asks."""
    started = Shipper()
    atexit.register(started.end)
    return started
