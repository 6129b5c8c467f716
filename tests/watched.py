"""A training run that is watched from outside: its commands, one after the other, and what their lines tell.

epoch 1/3 step 7/22  loss ...     -> a step; steps count through: epoch 2 step 7 of 22 is step 29
restart 1: rank 1: ...            -> somebody noticed that something is wrong; so is `error: ...`, and an end
"""

import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Literal

STEP = re.compile(r"epoch (\d+)/\d+ step (\d+)/(\d+) ")
NOTICE = re.compile(r"restart \d+:|error: ")
ANEW = re.compile(r"(resize \d+ -> \d+|resumed) at ")


@dataclass(frozen=True)
class Event:
    """Something that was heard, at a time of time.monotonic()."""

    at: float
    kind: Literal["step", "notice", "anew", "line", "exit"]
    step: int = 0  # done by now; of "step"
    text: str = ""
    code: int = 0  # of "exit"


def event_of(at: float, line: str) -> Event:
    """What a line tells."""
    if found := STEP.match(line):
        epoch, step, steps = map(int, found.groups())
        return Event(at, "step", (epoch - 1) * steps + step, line)
    kinds = {"notice": NOTICE, "anew": ANEW}
    kind = next((kind for kind, words in kinds.items() if words.match(line)), "line")
    return Event(at, kind, text=line)


@dataclass(frozen=True)
class Effect:
    """What a fault did to a run. Seconds, steps."""

    noticed: float | None  # after the fault; None where nobody had to
    stall: float  # longest time without a new step
    repeated: int  # steps that were done again


def effect_of(before: Event, began: float, heard: list[Event]) -> Effect:
    """`before` is the last new step before the fault, `heard` what came after it, up to the step that ends it.

    Steps that were done before the fault may be heard after it, so the stall is the longest time between two new ones.
    """
    noticed = next((e.at - began for e in heard if e.kind in ("notice", "exit")), None)
    reached, last, new, repeated = before.step, before.step, [before.at], 0
    for step in (event for event in heard if event.kind == "step"):
        if step.step > reached:
            new.append(step.at)
        elif step.step <= last:
            repeated += last - step.step + 1
        reached, last = max(reached, step.step), step.step
    return Effect(noticed, max((b - a for a, b in pairwise(new)), default=0.0), repeated)


class Watched:
    """The run. `start` gives its command; every line goes to `log` too, with the seconds since this began.

    events: all that was heard; newest: the step that got furthest; code: how the command ended, None while it runs.
    """

    def __init__(self, start: Callable[[], subprocess.Popen], log: IO[str]) -> None:
        self._start, self._log = start, log
        self._heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.events: list[Event] = []
        self._began = time.monotonic()
        self.newest = Event(self._began, "step")
        self.code: int | None = None

    def start(self) -> None:
        """Gives the command, once more where it has ended."""
        self.code = None
        self.process = self._start()
        self._threads = [self._thread(self._read, self.process.stderr), self._thread(self._read, self.process.stdout)]
        self._threads.append(self._thread(self._wait, self.process, *self._threads))

    def listen(self, seconds: float) -> list[Event]:
        """What comes within so many seconds: at least one event, or none."""
        fresh = []
        while True:
            try:
                fresh.append(self._heard.get(timeout=0 if fresh else seconds))
            except queue.Empty:
                break
        for event in fresh:
            self._take(event)
        return fresh

    def close(self) -> None:
        """Waits for the threads of a command that has ended."""
        for thread in self._threads:
            thread.join()

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "step" and event.step > self.newest.step:
            self.newest = event
        elif event.kind == "exit":
            self.code = event.code
            self._log.write(f"{event.at - self._began:7.1f} -- exit code {event.code} --\n")
        if event.text:
            self._log.write(f"{event.at - self._began:7.1f} {event.text}\n")
            self._log.flush()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._heard.put(event_of(time.monotonic(), line.rstrip("\n")))

    def _wait(self, process: subprocess.Popen, *readers: threading.Thread) -> None:
        for reader in readers:
            reader.join()
        self._heard.put(Event(time.monotonic(), "exit", code=process.wait()))

    def _thread(self, function: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        return thread
