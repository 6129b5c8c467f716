"""Looks at the cluster while a group trains: nodes that are told to go, and nodes that would make it faster."""

import threading
import time
from collections.abc import Collection

from orchestrator.cluster import session
from orchestrator.cluster.room import Room
from orchestrator.cluster.session import Node

LOOK_S = 1.0
STEADY_S = 3.0  # that more room must last: nodes come one by one


class Watch:
    """In a thread of its own: while Ray's head is away its answers take long, and the driver has a lease to keep.

    workers: of the group. `held` are the ids of the nodes that its workers are on, once they are known.
    """

    def __init__(self, room: Room, workers: int) -> None:
        self._room, self._workers = room, workers
        self.held: Collection[str] = ()
        self.leaving: list[Node] = []  # of the group's nodes those that were told to go
        self.possible = workers  # workers that would fit
        self._more_since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skiplane-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it; a call to a head that is away may outlive this by a minute, and changes nothing any more."""
        self._ended.set()
        self._thread.join(LOOK_S)

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self._look()
            except Exception:  # whatever Ray raises while its head is away; the next look may know more
                self._more_since = None

    def _look(self) -> None:
        told = session.draining()
        self.leaving = [node for node in session.nodes() if node.id in told and node.id in self.held]
        usable = self._room.usable()
        more = min(self._room.fits(usable), self._workers + self._room.free())
        if more <= self._workers:
            self._more_since, self.possible = None, self._workers
            return
        self._more_since = self._more_since or time.monotonic()
        if time.monotonic() - self._more_since >= STEADY_S:
            self._room.admit(usable)
            self.possible = min(self._room.fits(usable), more)
