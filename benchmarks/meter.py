"""CPU seconds of all processes that carry a mark in their environment, those that have ended included.

Ray's processes are nobody's children for long, and whoever starts them does not wait for them, so no parent knows what
they used: they are looked at while they live. What a process uses between the last look and its end is not counted.
"""

import threading
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Self

import psutil

from orchestrator.cluster.processes import MARK, VANISHING

LOOK_S = 0.2
YOUNG_S = 2.0
Process = tuple[int, float]  # pid, time of creation: pids are used again


class Meter:
    """Looks while the context lasts. marks: values of the variable that processes.start sets."""

    def __init__(self, marks: Collection[str]) -> None:
        self._marks, self._used = frozenset(marks), dict[Process, float]()
        self._strangers, self._lock = set[Process](), threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def cpu_s(self) -> float:
        """Seconds so far, in steps of 10 ms a process."""
        with self._lock:
            self._look()
            return sum(self._used.values())

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self.cpu_s()

    def _look(self) -> None:
        for process in psutil.process_iter():
            with suppress(*VANISHING):
                known = (process.pid, process.create_time())
                if known not in self._strangers and (known in self._used or self._ours(process, known)):
                    self._used[known] = sum(process.cpu_times()[:2])

    def _ours(self, process: psutil.Process, known: Process) -> bool:
        """Asked once: but a process that has not come to its own program yet has its parent's environment."""
        try:
            ours = process.environ().get(MARK) in self._marks
        except VANISHING:
            ours = False
        if not ours and time.time() - known[1] > YOUNG_S:
            self._strangers.add(known)
        return ours
