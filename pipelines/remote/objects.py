"""A file or an object by its path or URL: size, bytes, hash. Patient with servers, and sentences where it fails."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines.errors import DataError
from pipelines.remote.failures import NoRanges, StoreError
from pipelines.remote.patience import REQUEST_S, Patience
from pipelines.remote.url import is_url, split_url

if TYPE_CHECKING:
    from pipelines.remote.store import Store  # needs obstore, which files do not

T = TypeVar("T")
RANGE = 8 << 20  # bytes that one request asks for
ASKING_S = 30.0  # for what a person waits for; shards in training have a patience of their own


class Objects:
    """Reads from paths and URLs; any thread may. endpoint: of an S3-compatible store. request_s: for one answer.

    Methods raise DataError, with the place and the cause.
    """

    def __init__(self, endpoint: str = "", patience: Patience | None = None, request_s: float = REQUEST_S) -> None:
        self.endpoint, self._patience, self._request_s = endpoint, patience or Patience(ASKING_S), request_s
        self._stores: dict[str, Store] = {}

    def store(self, url: str) -> "tuple[Store, str]":
        """The client for a URL, and the object's name there."""
        from pipelines.remote.store import Store

        try:
            root, name = split_url(url)
        except ValueError as error:
            raise DataError(str(error)) from error
        if root not in self._stores:
            self._stores[root] = Store(root, self.endpoint, self._request_s)
        return self._stores[root], name

    def size(self, where: str) -> int:
        """Bytes."""
        if is_url(where):
            return self._asked(where, lambda store, name: store.size(name))
        if not Path(where).is_file():
            raise DataError(f"{where} is missing")
        return Path(where).stat().st_size

    def read(self, where: str) -> bytes:
        """A small file or object."""
        if is_url(where):
            return self._asked(where, lambda store, name: store.read(name))
        with _named(where):
            return Path(where).read_bytes()

    def part(self, where: str, begin: int, end: int) -> bytes:
        """Bytes begin .. end."""
        if is_url(where):
            return bytes(self.ranges(where, [begin], [end])[0])
        with _named(where), open(where, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), end - begin, begin)
        if len(data) < end - begin:
            raise DataError(f"{where} ends after {begin + len(data):,} bytes, before {end:,}")
        return data

    def touch(self, where: str) -> None:
        """Reads a byte, because reading may need more rights than looking; where a server has no ranges, its size."""
        if self.size(where):
            try:
                self.part(where, 0, 1)
            except DataError as error:
                if not isinstance(error.__cause__, NoRanges):
                    raise

    def ranges(self, url: str, begins: Sequence[int], ends: Sequence[int]) -> list[memoryview]:
        """Several parts of an object at once."""
        return self._asked(url, lambda store, name: store.ranges(name, begins, ends))

    def parts(self, where: str, size: int) -> Iterator[bytes]:
        """All `size` bytes, some megabytes at a time."""
        begin = 0
        while begin < size:
            try:
                part = self.part(where, begin, min(begin + RANGE, size))
            except DataError as error:
                if begin or not isinstance(error.__cause__, NoRanges):
                    raise
                yield from self._whole(where)
                return
            yield part
            begin += len(part)

    def whole(self, where: str) -> memoryview:
        """All bytes of a large file or object, held once."""
        size, at = self.size(where), 0
        data = memoryview(bytearray(size))
        for part in self.parts(where, size):
            if at + len(part) > size:
                raise DataError(f"{where} has more than the {size:,} bytes that it is said to have")
            data[at : at + len(part)] = part
            at += len(part)
        return data[:at]

    def _whole(self, url: str) -> Iterator[bytes]:
        """From a server that gives it whole or not at all: in one request, which is not made again."""
        store, name = self.store(url)
        try:
            yield from map(bytes, store.chunks(name))
        except StoreError as error:
            raise DataError(self._patience.told(error)) from error

    def sha256(self, where: str, size: int) -> str:
        """Hash of all bytes, in hex."""
        digest = hashlib.sha256()
        for part in self.parts(where, size):
            digest.update(part)
        return digest.hexdigest()

    def _asked(self, url: str, request: "Callable[[Store, str], T]") -> T:
        store, name = self.store(url)
        try:
            return self._patience(lambda: request(store, name))
        except StoreError as error:
            raise DataError(self._patience.told(error)) from error


class _named:
    """Turns an OSError into a sentence about a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise DataError(f"{self._path} cannot be read: {error.strerror}") from error
