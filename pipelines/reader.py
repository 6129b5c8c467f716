"""Sample ids -> encoded bytes: one slab a batch, crc32 checked on the way."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.dataset import Dataset
from pipelines.index import BLOCK, Index, key_of
from pipelines.remote.shards import RangedShards
from pipelines.remote.url import is_url
from pipelines.shards import LocalShards, Shards

Slab = NDArray[np.uint8]


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


def _shards_of(dataset: Dataset, split: str, threads: int) -> Shards:
    """Where nothing fetches them: files where they lie, objects range by range."""
    places = [dataset.locate(shard.name) for shard in dataset.splits[split].shards]
    return RangedShards(dataset.objects, places) if any(map(is_url, places)) else LocalShards(places, threads)


class Reader:
    """Reads samples of one split, with up to `threads` reads at once. Any thread may call it; calls take turns.

    records, shards: the split's index and tars, where something else than this brings them. Closing the reader closes
    the shards.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        threads: int = 2,
        *,
        records: Index | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.split = dataset.splits[split]
        self._index = dataset.index(split) if records is None else records
        self._shards = shards or _shards_of(dataset, split, threads)
        self._turn = threading.Lock()

    def read(self, ids: ArrayLike, allocate: Callable[[int], Slab] = _new) -> EncodedBatch:
        """One batch in the order of ids; `allocate` makes its slab.

        Raises DataError where a shard is missing, cannot be had, or ends before its index does.
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
        shard, block = (int(self._index[sample][field]) for field in ("shard", "block"))
        header = bytearray(BLOCK)
        with self._turn:
            self._shards.read([shard], [(block - 1) * BLOCK], [memoryview(header)], None)
        return self.split.shards[shard].name, key_of(bytes(header), block)

    def close(self) -> None:
        """Closes the shards."""
        with self._turn:
            self._shards.close()

    def _fill(self, records: Index, offsets: NDArray[np.int64], slab: "memoryview[int]") -> NDArray[np.uint32]:
        begins = (records["block"].astype(np.int64) * BLOCK).tolist()
        views = [slab[a:b] for a, b in itertools.pairwise(offsets.tolist())]
        return np.array(self._shards.read(records["shard"].tolist(), begins, views, records["crc32"]), np.uint32)
