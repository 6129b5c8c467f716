"""The members of a tar, by their headers: where their bytes lie. A tar that is cut short is refused.

Python's tarfile stops without a word at a header that it cannot read, and so does webdataset.
"""

import tarfile
from collections.abc import Iterator
from typing import IO

from pipelines.errors import DataError
from pipelines.index import BLOCK

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def members(file: IO[bytes], begin: int, end: int, what: str, alone: bool = False) -> Iterator[tarfile.TarInfo]:
    """Of the tar at begin..end of `file`, with offsets in the file; memory does not grow with their number.

    alone: nothing but zeros may follow the end mark. Raises DataError, which begins with `what`.
    """
    try:
        file.seek(begin)
        first = file.read(6)
        if packed := next((kind for magic, kind in PACKED.items() if first.startswith(magic)), ""):
            raise tarfile.ReadError(
                f"it is compressed with {packed}, so that no image can be read by itself: unpack it"
            )
        file.seek(begin)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > end and not member.issparse():  # its size is not what lies here
                    raise tarfile.ReadError("unexpected end of data")
                yield member
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK) or tar.offset >= end:
                raise tarfile.ReadError("its end mark is missing")
        while alone and (rest := file.read(1 << 20)):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more behind its end mark, as when tars are laid end to end")
    except tarfile.TarError as error:
        raise DataError(f"{what} is not a plain tar, or cut short ({error}); fetch it again") from error
