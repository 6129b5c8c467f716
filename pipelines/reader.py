"""Sample ids -> encoded bytes: `pread` by a few threads into one slab a batch, crc32 checked on the way.

Never mmap: a shared file that shrinks would kill the process.
"""

import itertools
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.dataset import Dataset
from pipelines.errors import DataError
from pipelines.index import BLOCK, key_at


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

    def take(self, rows: Sequence[int]) -> "EncodedBatch":
        """Some samples, with repetition: what is fed in place of bad ones. Copies their bytes."""
        index = np.asarray(rows)
        parts = [self.image(i) for i in rows]
        offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        return EncodedBatch(
            self.ids[index],
            np.concatenate(parts) if parts else self.data[:0],
            offsets,
            self.labels[index],
            self.sizes[index],
            self.crc32[index],
            self.intact[index],
        )


class Reader:
    """Reads samples of one split with `threads` threads. Safe to share between threads."""

    def __init__(self, dataset: Dataset, split: str, threads: int = 2) -> None:
        self.split = dataset.splits[split]
        self._index = dataset.index(split)
        self._paths = [dataset.root / shard.name for shard in self.split.shards]
        self._files: dict[int, int] = {}
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader") if threads > 1 else None

    def read(self, ids: ArrayLike) -> EncodedBatch:
        """One batch. Raises DataError where a shard is missing or shorter than its index says."""
        ids = np.asarray(ids, np.int64)
        records = self._index[ids]
        offsets = np.concatenate([[0], np.cumsum(records["size"], dtype=np.int64)])
        data = np.empty(int(offsets[-1]), np.uint8)
        crcs = np.empty(len(ids), np.uint32)
        jobs = list(
            zip(
                records["shard"].tolist(),
                records["block"].tolist(),
                offsets.tolist(),
                offsets[1:].tolist(),
                strict=False,
            )
        )
        self._fill(jobs, memoryview(data), crcs)
        sizes = np.stack([records["height"], records["width"]], axis=1).astype(np.int32)
        return EncodedBatch(
            ids, data, offsets, records["label"].astype(np.int32), sizes, crcs, crcs == records["crc32"]
        )

    def name(self, sample: int) -> tuple[str, str]:
        """(shard, key) of a sample, for messages."""
        record = self._index[sample]
        path = self._paths[int(record["shard"])]
        return path.name, key_at(path, int(record["block"]))

    def close(self) -> None:
        """Closes the shards and ends the threads."""
        if self._pool:
            self._pool.shutdown()
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _fill(self, jobs: list[tuple[int, int, int, int]], slab: memoryview, crcs: NDArray[np.uint32]) -> None:
        """Reads every job's bytes into the slab; a few large pieces of work, because a task costs more than a read."""

        def part(first: int) -> None:
            for i in range(first, len(jobs), self._threads):
                shard, block, begin, end = jobs[i]
                crcs[i] = self._pread(shard, block, slab[begin:end])

        if self._pool is None:
            part(0)
        else:
            list(self._pool.map(part, range(self._threads)))

    def _pread(self, shard: int, block: int, into: memoryview) -> int:
        file, done = self._file(shard), 0
        while done < len(into):
            got = os.preadv(file, [into[done:]], block * BLOCK + done)
            if got == 0:
                raise DataError(
                    f"shard {self._paths[shard]} ends before its index does; copy or pack the dataset again"
                )
            done += got
        return zlib.crc32(into)

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            path: Path = self._paths[shard]
            try:
                opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(
                    f"shard {path} cannot be opened: {error.strerror}; copy or pack the dataset again"
                ) from error
            if self._files.setdefault(shard, opened) != opened:  # another thread was faster
                os.close(opened)
        return self._files[shard]
