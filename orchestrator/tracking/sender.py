"""The thread that takes records from an outbox and delivers them, however long the server is away."""

import logging
import threading
import time
from collections.abc import Callable

from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.records import Record

BATCH = 1000  # MLflow's limit of one request
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
HURRIED_PAUSE_S = 0.5  # between attempts once the run is over
POLL_S = 0.2

log = logging.getLogger("skiplane.tracking")


class Unreachable(Exception):
    """The server is away, slow or ill: the same records may go through later."""


class Refused(Exception):
    """The server will never take some of these records; the others it has."""


class Sender:
    """Delivers in order, at least once: a batch whose answer was lost is sent again, and the receiver drops doubles.

    `deliver` raises Unreachable (tried again, with growing pauses) or Refused (said, and gone on with).
    """

    def __init__(self, outbox: Outbox, deliver: Callable[[list[Record]], None], where: str) -> None:
        self._outbox, self._deliver, self._where = outbox, deliver, where
        self._hurry, self._stop = threading.Event(), threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._run, name="skiplane-tracking", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> int:
        """Lets what waits go out for `timeout_s` at most, then ends; returns how many records are left.

        A request that hangs may outlive this call by its own timeout: in a daemon thread, which holds nothing up.
        """
        limit = time.monotonic() + timeout_s
        self._hurry.set()
        while len(self._outbox) and time.monotonic() < limit and self._thread.is_alive():
            time.sleep(0.01)
        self._stop.set()
        self._thread.join(max(0.0, min(limit - time.monotonic(), 1.0)))
        return len(self._outbox)

    def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._stop.is_set():
            records = self._outbox.peek(BATCH, POLL_S)
            if not records:
                continue
            try:
                self._deliver(records)
            except Unreachable as error:
                self._say_away(error)
                self._wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            except Refused as error:
                log.warning("%s refused, and will not have: %s", self._where, error)
            self._outbox.done(len(records))
            self._say_back()
            pause = FIRST_PAUSE_S

    def _wait(self, pause: float) -> None:
        if self._hurry.is_set():
            self._stop.wait(HURRIED_PAUSE_S)
        else:
            self._hurry.wait(pause)

    def _say_away(self, error: Exception) -> None:
        if not self._away:
            log.warning("%s does not answer (%s); training goes on, points wait", self._where, error)
        self._away = True

    def _say_back(self) -> None:
        if self._away:
            log.warning("%s answers again", self._where)
        self._away = False
