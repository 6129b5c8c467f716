"""The tars of a split that lie on servers: read by range, or from the node's cache where they have arrived."""

import zlib
from collections import Counter as Sums
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.remote.failures import NoRanges
from pipelines.remote.objects import Objects
from pipelines.remote.transfer import Counter
from pipelines.shards import MOST_OPEN, OpenFile, Preads, View

AT_ONCE = 16  # shards asked for ranges at once; a store answers in tens of milliseconds
IDLE = 64  # reads; a shard unused for so long is closed, so that its cache entry may be evicted
RANGE_SHARE = 0.25  # of a shard's bytes may be read by range: then waiting for all of it costs fewer bytes

Crcs = NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Rows of a batch: fill into[i] from byte begins[i] of shard shards[i]."""

    shards: Sequence[int]
    begins: Sequence[int]
    into: Sequence[View]

    def only(self, rows: Sequence[int]) -> "Asked":
        """Some of them."""
        shards, begins, into = self.shards, self.begins, self.into
        return Asked([shards[row] for row in rows], [begins[row] for row in rows], [into[row] for row in rows])

    def rows_of(self, shard: int) -> list[int]:
        """Those of one shard."""
        return [row for row, other in enumerate(self.shards) if other == shard]

    @property
    def bytes(self) -> Sums[int]:
        """Of each shard."""
        sums: Sums[int] = Sums()
        for shard, view in zip(self.shards, self.into, strict=True):
            sums[shard] += len(view)
        return sums


class RangedShards:
    """Every read is a request: for a look into a dataset, and for what has not arrived yet."""

    def __init__(self, objects: Objects, urls: Sequence[str]) -> None:
        self._objects, self._urls = objects, urls
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="skiplane-range")

    def read(
        self, shards: Sequence[int], begins: Sequence[int], into: Sequence[View], wanted: NDArray[np.uint32] | None
    ) -> list[int]:
        """See Shards."""
        asked = Asked(shards, begins, into)
        list(self._pool.map(lambda shard: self._fill(shard, asked.only(asked.rows_of(shard))), sorted(set(shards))))
        return [zlib.crc32(view) for view in into]

    def close(self) -> None:
        """See Shards."""
        self._pool.shutdown()

    def _fill(self, shard: int, asked: Asked) -> None:
        ends = [begin + len(view) for begin, view in zip(asked.begins, asked.into, strict=True)]
        try:
            parts = self._objects.ranges(self._urls[shard], asked.begins, ends)
        except DataError as error:
            raise DataError(f"shard {error}") from error.__cause__
        for view, part in zip(asked.into, parts, strict=True):
            if len(part) != len(view):
                raise DataError(f"shard {self._urls[shard]} ends before its index does; copy or pack the dataset again")
            view[:] = part


class Shelf(Protocol):
    """A split's place in the cache."""

    def open(self, shard: int) -> OpenFile | None:
        """Its file; None while it is not here."""

    def bring(self, shard: int) -> bool:
        """Waits until it is here; False where the cache has no room. Raises DataError where it cannot be had."""

    def damaged(self, shard: int, file: OpenFile) -> bool:
        """Hashes an open file that gave wrong bytes; whether it is damaged, and gone by now."""


class CachedShards:
    """From the cache where a shard is there; by range where it is not yet; waiting where ranges would cost too much.

    sizes: bytes of each shard. counter: hears of samples that were there, that were not, and that were read by range.
    say: hears of a server without ranges.
    """

    def __init__(
        self,
        shelf: Shelf,
        ranged: RangedShards,
        sizes: Sequence[int],
        threads: int,
        counter: Counter,
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._shelf, self._ranged, self._sizes, self._counter = shelf, ranged, sizes, counter
        self._preads = Preads(threads)
        self._open: OrderedDict[int, tuple[OpenFile, int]] = OrderedDict()  # shard -> (file, number of its last read)
        self._spent: Sums[int] = Sums()  # bytes read by range, of each shard
        self._reads = 0
        self._whole_only = False  # the server has no ranges

    def read(
        self, shards: Sequence[int], begins: Sequence[int], into: Sequence[View], wanted: NDArray[np.uint32] | None
    ) -> list[int]:
        """See Shards. What was wrong is read again, from a shard that was fetched again."""
        self._close_idle()
        asked, crcs = Asked(shards, begins, into), np.zeros(len(shards), np.int64)
        away = self._away(asked)
        self._read_files(asked, [row for row in range(len(shards)) if row not in away], crcs)
        self._read_ranges(asked, sorted(away), crcs)
        if wanted is not None:
            wrong = np.flatnonzero(crcs != wanted).tolist()
            for shard in sorted({shards[row] for row in wrong}):
                self._read_again(asked, shard, [row for row in wrong if shards[row] == shard], crcs)
        return [int(crc) for crc in crcs]

    def close(self) -> None:
        """See Shards."""
        self._ranged.close()
        self._preads.close()
        while self._open:
            self._open.popitem()[1][0].close()

    def _away(self, asked: Asked) -> set[int]:
        """Rows that have to be read by range. Waits for shards of which that would be too much."""
        missing = [row for row in range(len(asked.shards)) if self._file(asked.shards[row]) is None]
        self._counter.read(len(asked.shards) - len(missing), len(missing))
        for shard, more in asked.only(missing).bytes.items():
            if self._whole_only or self._spent[shard] + more > RANGE_SHARE * self._sizes[shard]:
                self._shelf.bring(shard)
        return {row for row in missing if self._file(asked.shards[row]) is None}

    def _read_ranges(self, asked: Asked, rows: list[int], crcs: Crcs) -> None:
        if not rows:
            return
        some = asked.only(rows)
        try:
            crcs[rows] = self._ranged.read(some.shards, some.begins, some.into, None)
        except DataError as error:
            if self._whole_only or not isinstance(error.__cause__, NoRanges):
                raise
            self._whole_only = True
            self._say("the server gives whole objects only, so the first batch waits for its shards")
            self._away(some)
            self._read_files(asked, rows, crcs)
            return
        self._spent += some.bytes
        self._counter.add(samples=len(rows), sample_bytes=some.bytes.total())

    def _read_files(self, asked: Asked, rows: list[int], crcs: Crcs) -> None:
        some = asked.only(rows)
        crcs[rows] = self._preads([self._here(shard) for shard in some.shards], some.begins, some.into)

    def _read_again(self, asked: Asked, shard: int, rows: list[int], crcs: Crcs) -> None:
        """Rows of one shard whose bytes are wrong. Its hash tells a damaged copy from an image that was packed so."""
        if shard in self._open:
            if not self._shelf.damaged(shard, self._open[shard][0]):
                return  # the index is wrong about it: it counts as a bad image
            self._open.pop(shard)[0].close()
        if self._shelf.bring(shard):  # else there is no room to tell: it counts as a bad image
            self._read_files(asked, rows, crcs)

    def _here(self, shard: int) -> OpenFile:
        if (file := self._file(shard)) is None:
            raise DataError("a shard has to be read whole, and the cache has no room for it; raise data.cache_gb")
        return file

    def _file(self, shard: int) -> OpenFile | None:
        """The shard's file, held open until it is idle; None while it is not here."""
        file = self._open[shard][0] if shard in self._open else self._shelf.open(shard)
        if file:
            self._open[shard] = (file, self._reads)
            self._open.move_to_end(shard)
        return file

    def _close_idle(self) -> None:
        self._reads += 1
        while self._open:
            shard, (file, last) = next(iter(self._open.items()))
            if len(self._open) <= MOST_OPEN and self._reads - last <= IDLE:
                return
            file.close()
            del self._open[shard]
