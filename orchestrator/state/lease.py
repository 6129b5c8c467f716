"""The lease that keeps a second driver out of a run: `lease/000000007.json` in its storage.

The object with the highest number is the lease, and that number the fencing number. Taking the run is making the next
object, which folders and buckets let exactly one driver do; renewing is overwriting one's own; giving back is saying so
in it, so that the number never falls. A new holder removes the objects before its own.

A driver that was killed leaves its object behind. In the same process table its process is looked for; from elsewhere
it is watched until it has not been renewed for `patience_s`, by this driver's own clock, so clocks need not agree.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from orchestrator.state.driver import Driver
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError

FOLDER = "lease"
RENEW_S = 3.0
ANSWER_S = 6.0  # that one of the two requests of a renewal may take
PATIENCE_S = 15.0


@dataclass(frozen=True)
class Tenure:
    """One driver's time with a run, as its object says it. `driver` is None where power loss tore the object."""

    number: int
    driver: Driver | None
    count: int = 0  # rises with each renewal
    released: bool = False
    attempt: int = 0  # the driver's newest group of workers

    @property
    def over(self) -> bool:
        """Whether nobody will renew it, as far as can be known at once."""
        return self.released or self.driver is None or self.driver.surely_dead()

    @property
    def name(self) -> str:
        """Of the object."""
        return _name(self.number)

    def to_bytes(self) -> bytes:
        """The object's content."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(cls, number: int, data: bytes) -> "Tenure":
        """What an object says."""
        try:
            said = json.loads(data)
            driver = Driver(**said["driver"])
            return cls(number, driver, int(said["count"]), bool(said["released"]), int(said.get("attempt", 0)))
        except (ValueError, TypeError, KeyError):
            return cls(number, None)

    def __str__(self) -> str:
        return f"process {self.driver.pid} on {self.driver.host}" if self.driver else "an unknown process"


@dataclass(frozen=True)
class Fence:
    """For a worker: whether the driver that started it still holds the run in `place`, and its group is the newest.

    A group of one worker on a node that is cut off knows no better: it trains on, and its storage may be in reach.
    """

    place: str
    number: int
    attempt: int = 0

    def check(self) -> None:
        """Lists one small folder and reads one small object. Raises ClusterError where a worker may write no more."""
        storage = Storage(self.place)
        newest = _newest(storage)
        if newest is None or (newest.number, newest.attempt) <= (self.number, self.attempt):
            return
        if newest.number > self.number:
            raise ClusterError(
                f"the run in {self.place} was taken over by another driver (lease {newest.number}, ours is "
                f"{self.number}); this one stops"
            )
        raise ClusterError(
            f"the run in {self.place} has a newer group of workers ({newest.attempt}, ours is {self.attempt}); "
            f"this one stops"
        )


@contextmanager
def lease(storage: Storage, name: str, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> Iterator["Lease"]:
    """Holds the run for as long as this lasts.

    Raises ClusterError where another driver lives; waits for one that may be dead, and says so.
    """
    held = Lease(storage, _take(storage, name, say, patience_s), name)
    try:
        yield held
    finally:
        held.close()


class Lease:
    """A run that is held, and renewed by a thread of its own.

    A driver that stood still for longer than others are patient (SIGSTOP, a closed laptop) may have lost it without
    knowing: `confirm` before anything that another driver could have written meanwhile.
    """

    def __init__(self, storage: Storage, mine: Tenure, name: str) -> None:
        self.number = mine.number
        self._storage, self._mine, self._name = storage, mine, name
        # For renewals, no second tries: the next renewal is one. And none so late that others lost their patience.
        self._hasty = Storage(storage.place, wait_s=0.0, answer_s=ANSWER_S)
        self._count, self._attempt, self._lock = 0, 0, threading.Lock()
        self._ended, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="skiplane-lease", daemon=True)
        self._thread.start()

    def begin(self, attempt: int) -> Fence:
        """Workers of earlier attempts may write no more, those with this fence may. Raises as `confirm` does."""
        self._attempt = attempt
        self.confirm()
        return Fence(self._storage.place, self.number, attempt)

    @property
    def lost(self) -> bool:
        """Whether another driver is known to have taken the run; then nothing more may be written."""
        return self._lost.is_set()

    def check(self) -> None:
        """Costs nothing. Raises ClusterError where another driver is known to have taken the run."""
        if self.lost:
            raise ClusterError(f"run '{self._name}' was taken over by another driver; this one stops")

    def confirm(self) -> None:
        """Renews, and asks the storage. Raises ClusterError where another driver has taken the run, or where the
        storage stays away."""
        self._renew(self._storage)
        self.check()

    def close(self) -> None:
        """Gives the run back. Where the storage cannot be told, the next driver has to be patient."""
        self._ended.set()
        self._thread.join()
        if not self._lost.is_set():
            self._write(self._storage, released=True)

    def _keep(self) -> None:
        while not self._lost.is_set() and not self._ended.wait(RENEW_S):
            with suppress(ClusterError):  # storage that is away for a moment is no reason to give up
                self._renew(self._hasty)

    def _renew(self, asked: Storage) -> None:
        """Writes first: a network file system then lists the folder as it is, not as it was a minute ago. A full disk
        takes no object, but its list still says whose the run is."""
        with self._lock:
            if self._lost.is_set():
                return
            failed = self._write(self._hasty)
            numbers = _numbers(asked)
            if max(numbers, default=0) > self.number:
                self._lost.set()
                with suppress(ClusterError):
                    asked.remove(self._mine.name)  # of the past; what was just written, if it was gone
            elif failed and self.number not in numbers:
                raise failed

    def _write(self, storage: Storage, released: bool = False) -> ClusterError | None:
        """Its own object; returns why it could not be written."""
        self._count += 1
        said = Tenure(self.number, self._mine.driver, self._count, released, self._attempt)
        try:
            storage.write(said.name, said.to_bytes())
        except ClusterError as error:
            return error
        return None


def _take(storage: Storage, name: str, say: Callable[[str], None], patience_s: float) -> Tenure:
    """The tenure after the last one. Who is slower than another driver watches that one in turn."""
    me = Driver.this()
    while True:
        before = _newest(storage)
        if before is not None and not before.over:
            before = _outwait(storage, before, name, say, patience_s)
        mine = Tenure(before.number + 1 if before else 1, me)
        # Made, and the highest: one that was passed and removed meanwhile can be made again, and counts for nothing.
        if storage.create(mine.name, mine.to_bytes()) and (numbers := _numbers(storage))[-1:] == [mine.number]:
            for number in numbers[:-1]:
                storage.remove(_name(number))
            return mine


def _outwait(storage: Storage, before: Tenure, name: str, say: Callable[[str], None], patience_s: float) -> Tenure:
    """Until a tenure is over, or has not been renewed for `patience_s`; raises ClusterError when it is.

    A look that took long does not count: the storage was away, for the other driver too, or this one stood still.
    """
    say(f"run '{name}' is held by {before}; watching {patience_s:.0f} s whether it lives")
    watched, began = 0.0, time.monotonic()
    while watched < patience_s:
        time.sleep(min(0.2, patience_s / 10))
        now = _newest(storage)
        if now is None or now.over:
            return now or before
        if now != before:
            raise ClusterError(f"run '{name}' is being trained by {now}; wait for it, stop it, or use another --name")
        looked = time.monotonic()
        watched, began = (watched + looked - began if looked - began < patience_s / 3 else 0.0), looked
    return before


def _newest(storage: Storage) -> Tenure | None:
    while numbers := _numbers(storage):
        data = storage.read(_name(numbers[-1]))
        if data is not None:
            return Tenure.of(numbers[-1], data)
    return None  # where one was listed and not there, a newer one removed it: that is looked for


def _numbers(storage: Storage) -> list[int]:
    found = (re.fullmatch(rf"{FOLDER}/(\d{{9}})\.json", name) for name in storage.names(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def _name(number: int) -> str:
    return f"{FOLDER}/{number:09d}.json"
