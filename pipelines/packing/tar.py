"""Writing a shard: headers, data and padding, its index and its hash, in one pass.

The bytes are those of `webdataset.TarWriter(mtime=0)`, which takes three times as long; a test holds them equal.
"""

import hashlib
import tarfile
import zlib
from typing import BinaryIO

import numpy as np

from pipelines.index import BLOCK, RECORD, Index

MODE, OWNER = 0o444, "bigdata"  # webdataset's


class TarWriter:
    """Writes samples (KEY.cls, KEY.jpg) to a file at its beginning; memory is that of one image."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._rows: list[tuple[int, ...]] = []
        self.bytes = 0  # written so far

    def add(self, key: str, image: bytes, label: int, height: int, width: int) -> None:
        """One sample. key: ASCII, at most 95 characters. height, width: as stored, px. Raises OSError."""
        text = b"%d" % label
        self._write(header(f"{key}.cls", len(text)) + text.ljust(BLOCK, b"\0") + header(f"{key}.jpg", len(image)))
        self._rows.append((0, self.bytes // BLOCK, len(image), zlib.crc32(image), label, height, width))
        self._write(image)
        self._write(bytes(-len(image) % BLOCK))

    def finish(self) -> tuple[Index, str]:
        """Writes the end mark; returns the records (their shard is 0) and the sha256 of all bytes."""
        mark = 2 * BLOCK
        self._write(bytes(mark + -(self.bytes + mark) % tarfile.RECORDSIZE))
        return np.array(self._rows, RECORD), self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)


def header(name: str, size: int) -> bytes:
    """The block before a member's data. name: ASCII, at most 100 characters; size: below 8 GB."""
    block, letters, digits = bytearray(BLANK), name.encode("ascii"), b"%011o" % size
    block[: len(letters)] = letters
    block[SIZE] = digits
    block[CHECKSUM] = b"%06o\0" % (BLANK_SUM + sum(letters) + sum(digits))
    return bytes(block)


def _blank() -> bytearray:
    """A header without name, size and checksum, which counts as spaces in itself."""
    info = tarfile.TarInfo()
    info.mode, info.uname, info.gname = MODE, OWNER, OWNER
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[SIZE], block[CHECKSUM] = bytes(11), b" " * 7
    return block


SIZE, CHECKSUM = slice(124, 135), slice(148, 155)
BLANK = _blank()
BLANK_SUM = sum(BLANK)
