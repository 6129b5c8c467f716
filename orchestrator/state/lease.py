"""The lease that keeps a second driver out of a run: one small object in its storage, renewed while the driver lives.

A driver that was killed leaves its lease behind. On the same host its process is looked for; from elsewhere it is
watched until it has not been renewed for `patience_s`, by this driver's own clock, so clocks need not agree.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil

from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError

NAME = "lease.json"
RENEW_S = 3.0
PATIENCE_S = 15.0


@dataclass(frozen=True)
class Holder:
    """Who drives a run. `count` rises with each renewal, `number` with each new holder (the fencing number)."""

    id: str
    host: str
    pid: int
    started: float  # of the process, so that a pid used again is no driver
    number: int
    count: int = 0

    def surely_dead(self) -> bool:
        """Whether it ran here and is gone."""
        if self.host != socket.gethostname():
            return False
        try:
            return psutil.Process(self.pid).create_time() != self.started
        except psutil.NoSuchProcess:
            return True


@contextmanager
def lease(
    storage: Storage, name: str, say: Callable[[str], None], patience_s: float = PATIENCE_S
) -> Iterator[Callable[[], None]]:
    """Holds the run for as long as this lasts; yields a check that raises ClusterError once it is somebody else's.

    Raises ClusterError where another driver lives; waits for one that may be dead, and says so.
    """
    before = _read(storage)
    if before is not None and not before.surely_dead():
        _outwait(storage, before, name, say, patience_s)
    me = psutil.Process()
    mine = Holder(
        uuid.uuid4().hex, socket.gethostname(), os.getpid(), me.create_time(), before.number + 1 if before else 1
    )
    keeper = _Keeper(storage, mine, name)
    try:
        yield keeper.check
    finally:
        keeper.close()


class _Keeper:
    """Renews a lease from a thread of its own."""

    def __init__(self, storage: Storage, mine: Holder, name: str) -> None:
        self._storage, self._mine, self._name = storage, mine, name
        self._ended, self._lost = threading.Event(), threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._renew, name="skiplane-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ClusterError where another driver has taken the run."""
        if self._lost.is_set():
            raise ClusterError(f"run '{self._name}' was taken over by another driver; this one stops")

    def close(self) -> None:
        """Gives the run back."""
        self._ended.set()
        self._thread.join()
        if not self._lost.is_set():
            self._storage.remove(NAME)

    def _renew(self) -> None:
        count = 0
        while not self._ended.wait(RENEW_S):
            count += 1
            try:
                found = _read(self._storage)
                if found is not None and found.id != self._mine.id:
                    self._lost.set()
                    return
                self._write(count)
            except ClusterError:
                continue  # storage that is away for a moment is no reason to give up; nobody else can take it either

    def _write(self, count: int) -> None:
        self._storage.write(NAME, json.dumps(asdict(self._mine) | {"count": count}).encode())


def _outwait(storage: Storage, before: Holder, name: str, say: Callable[[str], None], patience_s: float) -> None:
    """Until the lease has not been renewed for `patience_s`; raises ClusterError when it is."""
    say(f"run '{name}' is held by process {before.pid} on {before.host}; watching {patience_s:.0f} s whether it lives")
    limit = time.monotonic() + patience_s
    while time.monotonic() < limit:
        time.sleep(min(0.2, patience_s / 10))
        now = _read(storage)
        if now is None:
            return
        if now != before:
            raise ClusterError(
                f"run '{name}' is being trained by process {now.pid} on {now.host}; wait for it, stop it, or use "
                f"another --name"
            )


def _read(storage: Storage) -> Holder | None:
    data = storage.read(NAME)
    try:
        return None if data is None else Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None  # torn by a power loss: nobody renews it
