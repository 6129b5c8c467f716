"""What a run on hosts is put through: one fault after the other, each taken back in time, and what each did to it."""

import errno
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from tests.hosts import Hosts
from tests.watched import Effect, Watched, effect_of

KINDS = ("worker", "node", "driver", "stop", "cut", "disk")
LIMIT_S = 180.0  # without a new step
BACK_S = 5.0  # that a node is off
STOP_S = 20.0  # that a worker stands still
CUT_S = 30.0  # that a link is cut, at most: it is healed when the run goes on
LAG_S = 60.0  # after which a healed node that has not ended was never given up
FULL_S = 30.0  # that the storage is full, at most: there is room again when the command has ended
FULL_EXIT = 4  # ClusterError
LOOK_S = 1.0


class Failed(Exception):
    """The run did not do what it promises."""


@dataclass(frozen=True)
class Fault:
    """What is to happen, `gap` new steps after the fault before is over."""

    kind: str
    gap: int


@dataclass(frozen=True)
class Suffered:
    """A fault as it came."""

    kind: str
    step: int  # newest before it
    what: str
    effect: Effect
    said: str = ""  # by the run when it went on: with how many workers, from where


class Ordeal:
    """A run whose command is given on host 0; its workers are on the others."""

    def __init__(self, hosts: Hosts, command: Sequence[str], rng: random.Random, log: IO[str]) -> None:
        self._hosts, self._rng = hosts, rng
        self._run = Watched(lambda: hosts.run(0, [sys.executable, *command]), log)
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._away: set[int] = set()  # hosts that are off or cut on purpose, or not back yet
        self._healed: dict[int, float] = {}  # of those the ones whose link is whole again, and until when they may lag
        self._cured: float | None = None  # when the cause of this fault was taken away
        self._on_exit: Callable[[], None] = self._refuse_exit
        self._looked = 0.0

    def suffer(self, faults: Sequence[Fault], say: Callable[[int, Suffered], None]) -> None:
        """All faults, then the run's end; `say` hears of each. Raises Failed."""
        self._run.start()
        for number, fault in enumerate(faults, 1):
            try:
                goal = self._run.newest.step + fault.gap
                self._until(lambda goal=goal: self._run.newest.step >= goal)
                say(number, self._suffer(fault.kind))
            except Failed as failed:
                raise Failed(f"fault {number} ({fault.kind}): {failed}") from failed
        self._on_exit = lambda: None
        self._until(lambda: self._run.code is not None)
        self._run.close()
        if self._run.code:
            raise Failed(f"the command ended with exit code {self._run.code}")

    def _suffer(self, kind: str) -> Suffered:
        self._until(lambda: self._ready(kind), LOOK_S)
        before, first, began = self._run.newest, len(self._run.events), time.monotonic()
        self._cured = None
        what = getattr(self, f"_{kind}")()
        self._until(lambda: self._over(kind, first))
        self._take_back(time.monotonic() + max(CUT_S, FULL_S))
        self._on_exit = self._refuse_exit
        heard = self._run.events[first:]
        said = next((event.text for event in heard if event.kind == "anew"), "")
        return Suffered(kind, before.step, what, effect_of(before, began, heard), said)

    def _ready(self, kind: str) -> bool:
        """Whether there is something to strike; a host goes only while all others are there."""
        if kind in ("node", "cut") and (self._away or self._hosts.alive() < self._hosts.count):
            return False
        return kind in ("driver", "disk") or bool(self._busy())

    def _over(self, kind: str, first: int) -> bool:
        """Whether a new step came after the run had begun anew; for some kinds after their cause was gone."""
        anew = [e.at for e in self._run.events[first:] if e.kind in ("notice", "exit", "anew")]
        gone = [self._cured] if self._cured is not None else []
        needed = gone if kind in ("stop", "disk") else anew
        return bool(needed) and self._run.newest.at > max(anew + gone)

    # -- faults --------------------------------------------------------------------------------------------------

    def _worker(self) -> str:
        worker, where = self._any_worker()
        worker.kill()
        return f"worker {worker.pid} on {where} killed"

    def _stop(self) -> str:
        worker, where = self._any_worker()
        worker.suspend()
        self._in(STOP_S, lambda: self._resume(worker))
        return f"worker {worker.pid} on {where} stopped for {STOP_S:.0f} s"

    def _node(self) -> str:
        host = self._rng.choice(self._busy())
        self._away.add(host)
        self._hosts.kill(host)
        self._in(BACK_S, lambda: self._away.discard(host))
        return f"node {self._hosts.address(host)} killed"

    def _cut(self) -> str:
        host = self._rng.choice(self._busy())
        self._away.add(host)
        self._hosts.cut(host)
        self._in(CUT_S, lambda: self._heal(host))
        return f"link of {self._hosts.address(host)} cut"

    def _driver(self) -> str:
        self._on_exit = self._again
        self._hosts.process(self._run.process).kill()
        return "driver killed"

    def _disk(self) -> str:
        filler = self._hosts.shared / "filler"
        _fill(filler)
        self._on_exit = lambda: self._again_with_room(filler)
        self._in(FULL_S, lambda: self._make_room(filler))
        return "storage full"

    def _busy(self) -> list[int]:
        """Hosts with workers."""
        return [i for i in range(1, self._hosts.count) if i not in self._away and self._hosts.workers(i)]

    def _any_worker(self) -> tuple[psutil.Process, str]:
        host = self._rng.choice(self._busy())
        return self._rng.choice(self._hosts.workers(host)), self._hosts.address(host)

    # -- and back ------------------------------------------------------------------------------------------------

    def _resume(self, worker: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            worker.resume()
        self._cured = time.monotonic()

    def _heal(self, host: int) -> None:
        """What ran there runs on, until its node hears that it was given up, and ends."""
        self._hosts.heal(host)
        self._healed[host] = time.monotonic() + LAG_S

    def _make_room(self, filler: Path) -> None:
        filler.unlink(missing_ok=True)
        self._cured = time.monotonic()

    def _again_with_room(self, filler: Path) -> None:
        if self._run.code != FULL_EXIT:
            raise Failed(f"the storage is full: exit code {FULL_EXIT} was expected, {self._run.code} came")
        self._make_room(filler)
        self._again()

    def _again(self) -> None:
        """The same command."""
        self._on_exit = self._refuse_exit
        self._run.start()

    def _refuse_exit(self) -> None:
        raise Failed(f"the command ended with exit code {self._run.code} while faults were still to come")

    # -- time ----------------------------------------------------------------------------------------------------

    def _in(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def _take_back(self, until: float) -> None:
        """Does what was to be done by then."""
        due = [action for at, action in self._later if at <= until]
        self._later = [(at, action) for at, action in self._later if at > until]
        for action in due:
            action()

    def _until(self, condition: Callable[[], bool], every: float = 0.0) -> None:
        """Listens, and takes back what is due; looks at the condition at most once in `every` seconds. Raises Failed
        where the run makes no progress."""
        look = 0.0
        while True:
            if time.monotonic() >= look:
                if condition():
                    return
                look = time.monotonic() + every
            if any(event.kind == "exit" for event in self._run.listen(0.1)):
                self._on_exit()
            self._take_back(time.monotonic())
            self._repair()
            if (still := time.monotonic() - self._run.newest.at) > LIMIT_S:
                raise Failed(f"no new step for {still:.0f} s, after step {self._run.newest.step}")

    def _repair(self) -> None:
        """Starts nodes that the cluster gave up, and hosts that are meant to be on again."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        for host, limit in list(self._healed.items()):
            if not self._hosts.serves(host) or self._looked > limit:
                del self._healed[host]
                self._away.discard(host)
        for host in set(range(self._hosts.count)) - self._away:
            if not self._hosts.serves(host):
                self._hosts.add(host)


def _fill(filler: Path) -> None:
    """Until there is not one byte left."""
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
