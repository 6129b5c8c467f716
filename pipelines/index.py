"""The index of a split: one fixed-size record a sample, 24 bytes, 31 MB for ImageNet. A sample's id is its row."""

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError

BLOCK = 512  # a tar's data always begins at a multiple of this
RECORD = np.dtype(
    [
        ("shard", "<u4"),
        ("block", "<u4"),  # offset of the image in its shard, in blocks: 2 TB a shard
        ("size", "<u4"),  # bytes of the image
        ("crc32", "<u4"),  # of these bytes
        ("label", "<i4"),
        ("height", "<u2"),  # as stored, before any EXIF rotation, px
        ("width", "<u2"),
    ]
)
Index = NDArray[np.void]


def write_index(path: Path, index: Index) -> str:
    """Writes the records; returns their sha256."""
    data = index.astype(RECORD, copy=False).tobytes()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def parse_index(data: bytes | memoryview, sha256: str, where: str) -> Index:
    """The records in the bytes of the index at `where`. Raises DataError where they are not those that were written."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"index {where} does not match its checksum in dataset.json; copy or pack the dataset again")
    records = np.frombuffer(data, RECORD)
    records.flags.writeable = False
    return records


def index_fault(records: Index, counts: Sequence[int], sizes: Sequence[int], classes: int) -> str:
    """What keeps records from being those of these shards (samples and bytes of each); empty where nothing does.

    A hash says that an index is the one that was written, not that who wrote it was right. 10 ms for ImageNet.
    """
    labels, shards = records["label"], records["shard"]
    if len(records) and (labels.min() < 0 or labels.max() >= classes):
        return f"has labels outside 0 .. {classes - 1}"
    if (len(records) and shards.max() >= len(counts)) or (np.bincount(shards, minlength=len(counts)) != counts).any():
        return "does not count the samples of its shards as dataset.json does"
    ends = records["block"].astype(np.int64) * BLOCK + records["size"]
    return "points outside its shards" if (ends > np.array(sizes, np.int64)[shards]).any() else ""


def key_of(header: bytes, block: int) -> str:
    """The name of a member without its extension, from the header block before its data; for messages only."""
    try:
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.TarError:
        return f"at byte {block * BLOCK}"
    return name.encode("unicode_escape").decode().rsplit(".", 1)[0]
