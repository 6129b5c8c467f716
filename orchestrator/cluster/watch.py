"""Looks at the cluster while a group trains: nodes that are lost, or told to go, and room for more workers."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection

from orchestrator.cluster import session
from orchestrator.cluster.room import Room
from orchestrator.cluster.session import Node

LOOK_S = 1.0
LOST_LOOKS = 4  # in a row without an answer: about five seconds. Ray itself, as it is shipped, takes a minute
STEADY_S = 3.0  # that more room must last: nodes come one by one


class Watch:
    """In threads of its own: while Ray's head is away its answers take long, and the driver has a lease to keep; and a
    new node may take a minute to answer what it is asked, while others die.

    workers: of the group. `held` are the ids of the nodes that its workers are on, once they are known.
    """

    def __init__(self, room: Room, workers: int) -> None:
        self._room, self._workers = room, workers
        self.held: Collection[str] = ()
        self.lost: list[str] = []  # addresses of the group's nodes that are gone or do not answer
        self.leaving: list[str] = []  # of those that were told to go, gone by now or not
        self.possible = workers  # workers that would fit
        self._silent: Counter[str] = Counter()  # node id -> looks in a row without an answer
        self._known: dict[str, Node] = {}
        self._told: set[str] = set()
        self._more_since: float | None = None
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(look,), name="skiplane-watch", daemon=True)
            for look in (self._look, self._look_for_more)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends it; a call to a head that is away may outlive this by a minute, and changes nothing any more."""
        self._ended.set()
        for thread in self._threads:
            thread.join(LOOK_S / 2)

    def _run(self, look: Callable[[], None]) -> None:
        began = time.monotonic()
        while not self._ended.wait(max(0.0, LOOK_S - (time.monotonic() - began))):
            began = time.monotonic()
            try:
                look()
            except Exception:  # whatever Ray raises while its head is away; the next look may know more
                continue

    def _look(self) -> None:
        alive = {node.id: node for node in session.nodes()}
        self._told |= session.draining()
        self._known |= alive
        ours = [node for id in self.held if (node := self._known.get(id))]
        answering = {node.id for node in session.reachable([node for node in ours if node.id in alive])}
        for node in ours:
            self._silent[node.id] = 0 if node.id in answering else self._silent[node.id] + 1
        self.lost = [n.address for n in ours if n.id not in alive or self._silent[n.id] >= LOST_LOOKS]
        self.leaving = [node.address for node in ours if node.id in self._told]

    def _look_for_more(self) -> None:
        usable = self._room.usable()
        more = min(self._room.fits(usable), self._workers + self._room.free(usable))
        if more <= self._workers:
            self._more_since, self.possible = None, self._workers
            return
        if self._more_since is None:
            self._more_since = time.monotonic()
        if time.monotonic() - self._more_since >= STEADY_S:
            self._room.admit(usable)
            self.possible = min(self._room.fits(usable), more)
