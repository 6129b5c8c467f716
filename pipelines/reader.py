"""Sample ids -> encoded bytes: `pread` by a few threads into one slab a batch, crc32 checked on the way.

Never mmap: a shared file that shrinks would kill the process.
"""

import itertools
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.dataset import Dataset
from pipelines.errors import DataError
from pipelines.index import BLOCK, Index, key_at

Slab = NDArray[np.uint8]
MOST_OPEN = 256  # shards kept open between batches; a process is usually allowed 1024 files
LEAST_PART = 16  # images; less is not worth a hand-over to another thread


def _new(size: int) -> Slab:
    return np.empty(size, np.uint8)


@dataclass(frozen=True)
class EncodedBatch:
    """Images as they lie in the shards. n samples in one slab: the seam between reading and decoding."""

    ids: NDArray[np.int64]  # [n]
    data: NDArray[np.uint8]  # [bytes]
    offsets: NDArray[np.int64]  # [n + 1] into data
    labels: NDArray[np.int32]  # [n]
    sizes: NDArray[np.int32]  # [n, 2] stored height and width, px
    crc32: NDArray[np.uint32]  # [n] of the bytes that were read
    intact: NDArray[np.bool_]  # [n] whether they are the bytes that were packed

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> NDArray[np.uint8]:
        """The bytes of one image, a view."""
        return self.data[self.offsets[i] : self.offsets[i + 1]]

    def images(self) -> list[NDArray[np.uint8]]:
        """Views of all images."""
        bounds = self.offsets.tolist()
        return [self.data[a:b] for a, b in itertools.pairwise(bounds)]

    def row(self, i: int) -> "EncodedBatch":
        """The batch of one sample, a view."""
        one, size = slice(i, i + 1), self.offsets[i + 1] - self.offsets[i]
        return EncodedBatch(
            self.ids[one],
            self.image(i),
            np.array([0, size]),
            self.labels[one],
            self.sizes[one],
            self.crc32[one],
            self.intact[one],
        )


def joined(batches: Sequence[EncodedBatch]) -> EncodedBatch:
    """Several batches as one; copies their bytes."""
    lengths = np.concatenate([np.diff(batch.offsets) for batch in batches])
    return EncodedBatch(
        np.concatenate([batch.ids for batch in batches]),
        np.concatenate([batch.data for batch in batches]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([batch.labels for batch in batches]),
        np.concatenate([batch.sizes for batch in batches]),
        np.concatenate([batch.crc32 for batch in batches]),
        np.concatenate([batch.intact for batch in batches]),
    )


class Reader:
    """Reads samples of one split, with up to `threads` reads at once. Any thread may call it; calls take turns."""

    def __init__(self, dataset: Dataset, split: str, threads: int = 2) -> None:
        self.split = dataset.splits[split]
        self._index = dataset.index(split)
        self._shards = OpenShards([dataset.root / shard.name for shard in self.split.shards])
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="skiplane-read")
        self._turn = threading.Lock()

    def read(self, ids: ArrayLike, allocate: Callable[[int], Slab] = _new) -> EncodedBatch:
        """One batch in the order of ids; `allocate` makes its slab.

        Raises DataError where a shard is missing, or ends before its index does.
        """
        ids = np.asarray(ids, np.int64)
        records = self._index[ids]
        offsets = np.concatenate([[0], np.cumsum(records["size"], dtype=np.int64)])
        data = allocate(int(offsets[-1]))
        with self._turn:
            crcs = self._fill(records, offsets, memoryview(data.data))
        sizes = np.stack([records["height"], records["width"]], axis=1).astype(np.int32)
        labels = records["label"].astype(np.int32)
        return EncodedBatch(ids, data, offsets, labels, sizes, crcs, crcs == records["crc32"])

    @property
    def smallest_side(self) -> int:
        """Of all images of the split, px."""
        return int(min(self._index["height"].min(), self._index["width"].min()))

    def name(self, sample: int) -> tuple[str, str]:
        """(shard, key) of a sample, for messages."""
        record = self._index[sample]
        path = self._shards.paths[int(record["shard"])]
        return path.name, key_at(path, int(record["block"]))

    def close(self) -> None:
        """Ends the threads and closes the shards."""
        self._pool.shutdown()
        with self._turn:
            self._shards.close()

    def _fill(self, records: Index, offsets: NDArray[np.int64], slab: "memoryview[int]") -> NDArray[np.uint32]:
        files = self._shards.files(records["shard"].tolist())
        begins = (records["block"].astype(np.int64) * BLOCK).tolist()
        views = [slab[a:b] for a, b in itertools.pairwise(offsets.tolist())]
        # A few large pieces of work, because handing one over costs more than a read; a single one is done here.
        each = max(LEAST_PART, -(-len(views) // self._threads))
        parts = [slice(first, first + each) for first in range(0, len(views), each)]

        def fill(part: slice) -> list[int]:
            return list(map(pread, files[part], begins[part], views[part]))

        done = map(fill, parts) if len(parts) == 1 else self._pool.map(fill, parts)
        return np.array([crc for part in done for crc in part], np.uint32)


@dataclass(frozen=True)
class OpenShard:
    """A shard and its file descriptor."""

    path: Path
    file: int


def pread(shard: OpenShard, begin: int, into: "memoryview[int]") -> int:
    """Fills `into` from byte `begin` of a shard; the crc32 of what was read. Raises DataError at the shard's end."""
    got = os.preadv(shard.file, [into], begin)
    while got < len(into):  # a network file system may give less than was asked for; nothing is the end
        more = os.preadv(shard.file, [into[got:]], begin + got)
        if more == 0:
            raise DataError(f"shard {shard.path} ends before its index does; copy or pack the dataset again")
        got += more
    return zlib.crc32(into)


class OpenShards:
    """Shards held open; past MOST_OPEN the one that was used longest ago is closed. Its callers take turns."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def files(self, shards: Sequence[int]) -> list[OpenShard]:
        """These shards, open until the next call. Raises DataError where one cannot be opened."""
        while len(self._open) > MOST_OPEN:
            os.close(self._open.popitem(last=False)[1].file)
        return [self._file(shard) for shard in shards]

    def close(self) -> None:
        """Closes them all."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def _file(self, shard: int) -> OpenShard:
        if shard not in self._open:
            path = self.paths[shard]
            try:
                self._open[shard] = OpenShard(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise DataError(
                    f"shard {path} cannot be opened: {error.strerror}; copy or pack the dataset again"
                ) from error
        self._open.move_to_end(shard)
        return self._open[shard]
