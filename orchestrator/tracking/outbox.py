"""Where records wait until they are sent. The seam for a durable journal: same methods, on disk."""

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from orchestrator.tracking.records import Record


class Outbox(Protocol):
    """Records in order, each kept until it is acknowledged. One reader, any number of writers."""

    def put(self, records: Sequence[Record]) -> None:
        """Appends; never waits."""

    def peek(self, limit: int, timeout_s: float) -> list[Record]:
        """The oldest records, `limit` at most; waits up to `timeout_s` for the first. They stay until `done`."""

    def done(self, count: int) -> None:
        """Forgets the oldest `count` records: they have arrived, or never will."""

    def __len__(self) -> int:
        """How many wait."""


class MemoryOutbox:
    """An outbox that lives and dies with its process: about 200 bytes a record."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque()
        self._filled = threading.Condition()

    def put(self, records: Sequence[Record]) -> None:
        """Appends; never waits."""
        with self._filled:
            self._records.extend(records)
            self._filled.notify_all()

    def peek(self, limit: int, timeout_s: float) -> list[Record]:
        """The oldest records; an empty list where none came in time."""
        with self._filled:
            self._filled.wait_for(lambda: self._records, timeout_s)
            return list(islice(self._records, limit))

    def done(self, count: int) -> None:
        """Forgets the oldest `count` records."""
        with self._filled:
            for _ in range(count):
                self._records.popleft()

    def __len__(self) -> int:
        return len(self._records)
