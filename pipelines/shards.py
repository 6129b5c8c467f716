"""The tars of a split that lie in files: `pread` by a few threads, crc32 on the way.

Never mmap: a shared file that shrinks would kill the process.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError

View = memoryview  # of bytes, writable
MOST_OPEN = 256  # shards kept open between batches; a process is usually allowed 1024 files
LEAST_PART = 16  # images; less is not worth a hand-over to another thread


class Shards(Protocol):
    """The tars of a split, as a Reader needs them; its calls take turns."""

    def read(
        self, shards: Sequence[int], begins: Sequence[int], into: Sequence[View], wanted: NDArray[np.uint32] | None
    ) -> list[int]:
        """Fills into[i] from byte begins[i] of shard shards[i]; the crc32 of each. wanted: what they should be.

        Raises DataError.
        """

    def close(self) -> None:
        """Ends threads, closes files."""


class LocalShards:
    """Shards that lie in files for good."""

    def __init__(self, paths: Sequence[str], threads: int = 2) -> None:
        self._paths = paths
        self._open: OrderedDict[int, OpenFile] = OrderedDict()
        self._preads = Preads(threads)

    def read(
        self, shards: Sequence[int], begins: Sequence[int], into: Sequence[View], wanted: NDArray[np.uint32] | None
    ) -> list[int]:
        """See Shards."""
        while len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        return self._preads([self._file(shard) for shard in shards], begins, into)

    def close(self) -> None:
        """See Shards."""
        self._preads.close()
        while self._open:
            self._open.popitem()[1].close()

    def _file(self, shard: int) -> "OpenFile":
        if shard not in self._open:
            self._open[shard] = OpenFile.of(self._paths[shard])
        self._open.move_to_end(shard)
        return self._open[shard]


@dataclass(frozen=True)
class OpenFile:
    """A shard's file and its descriptor."""

    path: str
    file: int

    @staticmethod
    def of(path: str) -> "OpenFile":
        """Raises DataError where it cannot be opened."""
        try:
            return OpenFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise DataError(
                f"shard {path} cannot be opened: {error.strerror}; copy or pack the dataset again"
            ) from error

    def close(self) -> None:
        os.close(self.file)


class Preads:
    """Many reads at once, by up to `threads` threads."""

    def __init__(self, threads: int) -> None:
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="skiplane-read")

    def __call__(self, files: Sequence[OpenFile], begins: Sequence[int], into: Sequence[View]) -> list[int]:
        """The crc32 of each."""
        # A few large pieces of work, because handing one over costs more than a read; a single one is done here.
        each = max(LEAST_PART, -(-len(into) // self._threads))
        parts = [slice(first, first + each) for first in range(0, len(into), each)]

        def fill(part: slice) -> list[int]:
            return list(map(pread, files[part], begins[part], into[part]))

        done = map(fill, parts) if len(parts) == 1 else self._pool.map(fill, parts)
        return [crc for part in done for crc in part]

    def close(self) -> None:
        self._pool.shutdown()


def pread(shard: OpenFile, begin: int, into: View) -> int:
    """Fills `into` from byte `begin` of a shard; the crc32 of what was read. Raises DataError at the shard's end."""
    got = os.preadv(shard.file, [into], begin)
    while got < len(into):  # a network file system may give less than was asked for; nothing is the end
        more = os.preadv(shard.file, [into[got:]], begin + got)
        if more == 0:
            raise DataError(f"shard {shard.path} ends before its index does; copy or pack the dataset again")
        got += more
    return zlib.crc32(into)
