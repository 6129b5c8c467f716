"""Many tasks at once, in fresh processes that end with this one, however it ends."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from pipelines.errors import ClusterError
from pipelines.packing.run import R, T, Work

SECONDS = 0.2  # between the lines that a process tells of its progress
END = object()


@dataclass(frozen=True)
class Processes:
    """`count` of them, with one task each at a time and one thread for it. Work, tasks and results are pickled."""

    count: int

    def __call__(self, work: Work[T, R], tasks: Iterable[T], tell: Callable[[T, int], None]) -> Iterator[tuple[T, R]]:
        """See Run. Raises ClusterError where a process dies."""
        left = iter(tasks)
        with ExitStack() as stack:
            busy: dict[Any, tuple[_Worker, Any]] = {}  # connection -> whose, and the task that it has
            first = list(itertools.islice(left, self.count))  # no more processes than tasks
            for worker, task in [(stack.enter_context(_worker(work)), task) for task in first]:
                busy[worker.connection] = worker, task
                worker.give(task)
            while busy:
                for connection in wait(list(busy)):
                    worker, task = busy[connection]
                    kind, value = worker.hear(task)
                    if kind == "told":
                        tell(task, value)
                        continue
                    if (following := next(left, END)) is END:
                        del busy[connection]
                    else:
                        busy[connection] = worker, following
                        worker.give(following)
                    yield task, value


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    connection: "Connection[Any, Any]"

    def give(self, task: object) -> None:
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            self._mourn(task)

    def hear(self, task: object) -> tuple[str, Any]:
        """("told", more of the task) or ("made", its result). Raises what the work raised."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._mourn(task)
        if kind == "failed":
            raise value
        return kind, value

    def _mourn(self, task: object) -> None:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise ClusterError(
            f"a packing process {how} while it made {task}; give the same command again, with fewer --workers if "
            "memory is short"
        )


@contextmanager
def _worker(work: Work[Any, Any]) -> Iterator[_Worker]:
    """A fresh process (a fork would inherit threads and locks): seconds of imports."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(work, theirs), daemon=True)
    resource_tracker.ensure_running()  # else it is started below, and lets SIGINT through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C on a terminal is for the parent
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    theirs.close()
    try:
        yield _Worker(process, ours)
    finally:
        process.kill()  # what it has not finished is staged
        process.join()
        process.close()
        ours.close()


def _work(work: Work[Any, Any], connection: "Connection[Any, Any]") -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            connection.send(_done(work, connection.recv(), _Teller(connection)))
    os._exit(1)


def _done(work: Work[Any, Any], task: object, tell: "_Teller") -> tuple[str, Any]:
    try:
        made = "made", work(task, tell, 1)
    except Exception as error:
        error.add_note(traceback.format_exc())
        made = "failed", error
    tell.flush()
    return made


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()  # its end of a pipe closes, also when it is killed
    os._exit(1)


@dataclass
class _Teller:
    """Tells of progress now and then, rather than of each image."""

    connection: "Connection[Any, Any]"
    more: int = 0
    told: float = field(default_factory=time.monotonic)

    def __call__(self, more: int) -> None:
        self.more += more
        if time.monotonic() - self.told > SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.more:
            self.connection.send(("told", self.more))
        self.more, self.told = 0, time.monotonic()
