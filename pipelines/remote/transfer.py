"""One object -> a file: tried again with patience, from where it was cut; hashed on the way, and counted."""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING

from pipelines.remote.failures import NoRanges, StoreError
from pipelines.remote.patience import Patience

if TYPE_CHECKING:
    from pipelines.remote.store import Store


@dataclass(frozen=True)
class Fetched:
    """What came over the network."""

    shards: int = 0  # whole ones that were kept
    shard_bytes: int = 0  # of whole shards and indexes, kept or not
    samples: int = 0  # read by range, before their shard was there
    sample_bytes: int = 0
    retries: int = 0  # requests that failed and were made again

    def to_dict(self) -> dict[str, int]:
        """For records and results."""
        return asdict(self)

    def __sub__(self, other: "Fetched") -> "Fetched":
        return Fetched(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Reads:
    """Samples that were asked for: their shard was in the cache, or it was not yet."""

    hits: int = 0
    misses: int = 0


class Counter:
    """Counts from several threads; `warn` hears of what is tried again."""

    def __init__(self, warn: Callable[[str], None] = lambda _: None) -> None:
        self._warn, self._lock, self._total, self._reads = warn, threading.Lock(), Fetched(), Reads()

    def add(self, **counts: int) -> None:
        """Adds to fields of Fetched."""
        with self._lock:
            now = self._total
            self._total = replace(now, **{name: getattr(now, name) + count for name, count in counts.items()})

    def failed(self, error: StoreError) -> None:
        """A request that is made again."""
        self.add(retries=1)
        self._warn(f"{error}; trying again")

    def read(self, hits: int, misses: int) -> None:
        """Samples that somebody asked for."""
        with self._lock:
            self._reads = Reads(self._reads.hits + hits, self._reads.misses + misses)

    @property
    def reads(self) -> Reads:
        """So far."""
        with self._lock:
            return self._reads

    @property
    def total(self) -> Fetched:
        """So far."""
        with self._lock:
            return self._total


class Transfer:
    """Writes an object of `size` bytes into a file; one request, which goes on where it was cut."""

    def __init__(self, store: "Store", name: str, size: int, file: int, counter: Counter) -> None:
        self._store, self._name, self._size = store, name, size
        self._file, self._counter = file, counter
        self._at, self._digest = 0, hashlib.sha256()

    def __call__(self, patience: Patience) -> str:
        """The sha256 of what was written, in hex; bytes past `size` are not. Raises StoreError when nothing comes."""
        patience(self._go_on, self._counter.failed, lambda: self._at)
        return self._digest.hexdigest()

    def _go_on(self) -> None:
        try:
            for part in self._store.chunks(self._name, self._at):
                self._counter.add(shard_bytes=len(part))
                if self._at + len(part) > self._size:
                    return  # something else than the object; its hash will say so
                self._write(part)
        except NoRanges:  # such a server gives it from the start, or not at all
            self._at, self._digest = 0, hashlib.sha256()
            self._go_on()

    def _write(self, part: memoryview) -> None:
        self._digest.update(part)
        while len(part):
            written = os.pwrite(self._file, part, self._at)
            part, self._at = part[written:], self._at + written
