"""When a trial is tried again, and when the sweep gives up for want of the cluster: to be gone on with, not lost."""

import time
from collections import Counter
from collections.abc import Callable

TRIES = 5  # in a row, without a report
PAUSE_S = 5.0  # before the second; twice as long before each one after: what is away may come back
Say = Callable[[str], None]


class Tries:
    """Of all trials of one submission.

    Where the cluster, or MLflow, lacks what a trial needs, it waits; where that lasts, `lacks` says what. wait_s: how
    long nothing may run because nothing fits.
    """

    def __init__(self, say: Say, wait_s: float) -> None:
        self._say, self._wait_s = say, wait_s
        self._lacked: Counter[str] = Counter()  # trial -> tries in a row that lacked something
        self._not_before: dict[str, float] = {}  # trial -> when it may be tried again
        self._unfit: float | None = None  # since when nothing runs because nothing fits
        self._said: set[str] = set()
        self.lacks: str | None = None

    def may(self, id: str) -> bool:
        """Whether it is time for the next try."""
        return time.monotonic() >= self._not_before.get(id, 0.0)

    def not_for(self, id: str, seconds: float) -> None:
        """No try for so long."""
        self._not_before[id] = time.monotonic() + seconds

    def progress(self, id: str) -> None:
        """What was in vain before counts no more."""
        self._lacked.pop(id, None)

    def lacking(self, id: str, why: str) -> None:
        """A try lacked something."""
        self._lacked[id] += 1
        if self._lacked[id] >= TRIES:
            self.lacks = f"trial {id} could not go on, {TRIES} times in a row: {why}"
        else:
            self.again(id, self._lacked[id], why)

    def again(self, id: str, tries: int, why: str) -> None:
        """The next try comes later, after so many in vain."""
        pause = PAUSE_S * 2 ** (tries - 1)
        self.not_for(id, pause)
        self._say(f"{id}: {why}; it is tried again in {pause:.0f} s")

    def fits(self) -> None:
        """Something does."""
        self._unfit = None

    def nothing_fits(self, why: str) -> None:
        """Nothing runs, so nothing will be free: but a node may come."""
        self._unfit = self._unfit or time.monotonic()
        self.say_once(f"waiting: {why}")
        if time.monotonic() - self._unfit > self._wait_s:
            self.lacks = f"{why}, after cluster.wait_seconds = {self._wait_s:g}"

    def say_once(self, text: str) -> None:
        """The same words are said once."""
        if text not in self._said:
            self._said.add(text)
            self._say(text)
