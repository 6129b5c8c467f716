"""The index of a split: one fixed-size record a sample, 24 bytes, 31 MB for ImageNet. A sample's id is its row."""

import hashlib
import tarfile
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


def key_of(header: bytes, block: int) -> str:
    """The name of a member without its extension, from the header block before its data; for messages only."""
    try:
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.TarError:
        return f"at byte {block * BLOCK}"
    return name.encode("unicode_escape").decode().rsplit(".", 1)[0]
