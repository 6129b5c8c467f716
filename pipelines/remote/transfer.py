"""One object -> a file: range after range, each tried again with patience; its sha256 on the way, its bytes counted."""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from pipelines.remote.patience import Patience
from pipelines.remote.store import RANGE, NoRanges, Store, StoreError


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

    def __add__(self, other: "Fetched") -> "Fetched":
        return Fetched(
            self.shards + other.shards,
            self.shard_bytes + other.shard_bytes,
            self.samples + other.samples,
            self.sample_bytes + other.sample_bytes,
            self.retries + other.retries,
        )

    def __sub__(self, other: "Fetched") -> "Fetched":
        return self + Fetched(-other.shards, -other.shard_bytes, -other.samples, -other.sample_bytes, -other.retries)


class Counter:
    """Counts from several threads; `warn` hears of what is tried again, and of other news."""

    def __init__(self, warn: Callable[[str], None] = lambda _: None) -> None:
        self._warn, self._lock, self._total = warn, threading.Lock(), Fetched()

    def add(self, **counts: int) -> None:
        """Adds to fields of Fetched."""
        with self._lock:
            now = self._total
            self._total = replace(now, **{name: getattr(now, name) + count for name, count in counts.items()})

    def failed(self, error: StoreError) -> None:
        """A request that is made again."""
        self.add(retries=1)
        self._warn(f"{error}; trying again")

    def note(self, text: str) -> None:
        """What a person should know."""
        self._warn(text)

    @property
    def total(self) -> Fetched:
        """So far."""
        with self._lock:
            return self._total


def transfer(store: Store, name: str, size: int, file: int, patience: Patience, counter: Counter) -> str:
    """Writes an object of `size` bytes into a file from its place; the sha256 of what was written, in hex.

    A transfer that is cut goes on at the last whole range. Raises StoreError when patience is at an end.
    """
    digest = hashlib.sha256()
    begin = 0
    while begin < size:
        end = min(begin + RANGE, size)
        try:
            (part,) = patience(lambda: store.ranges(name, [begin], [end]), counter.failed)  # noqa: B023  called here
        except NoRanges:
            counter.note(f"{store.place} gives whole objects only, so the first batch waits for its shards")
            return patience(lambda: _whole(store, name, size, file, counter), counter.failed)
        _write(file, part, begin)
        digest.update(part)
        counter.add(shard_bytes=len(part))
        begin = end
    return digest.hexdigest()


def _whole(store: Store, name: str, size: int, file: int, counter: Counter) -> str:
    """In one request, from a server that has no ranges; from the start each time."""
    digest, begin = hashlib.sha256(), 0
    for part in store.chunks(name):
        counter.add(shard_bytes=len(part))
        if begin + len(part) > size:
            break  # something else than the object; its hash will say so
        _write(file, part, begin)
        digest.update(part)
        begin += len(part)
    return digest.hexdigest()


def _write(file: int, part: memoryview, begin: int) -> None:
    while len(part):
        written = os.pwrite(file, part, begin)
        part, begin = part[written:], begin + written
