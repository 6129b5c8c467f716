"""The door to object stores: objects under one folder or URL, on a disk, S3, GCS, Azure or HTTP, alike.

obstore speaks them all. A local object is staged and renamed, so a killed writer leaves the old object or none; power
loss may still tear it. Credentials come from the usual environment (AWS_*, GOOGLE_*, AZURE_*; AWS_ENDPOINT_URL for
S3-compatible stores). Nothing is tried again here: who asks knows how long to be patient (`patience.py`).
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore import exceptions
from obstore.store import HTTPStore, LocalStore, ObjectStore, from_url

from pipelines.remote.failures import Denied, NoRanges, NotThere, StoreError
from pipelines.remote.patience import REQUEST_S
from pipelines.remote.url import is_url

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig

CHUNK = 1 << 18  # bytes of an answer that are handed on at once; what a cut leaves of one is asked for again
ONCE: "RetryConfig" = {"max_retries": 0}  # who asks is patient, and says so


class Store:
    """Objects under a folder or URL; any thread may use it. A folder is made by the first write.

    endpoint: address of an S3-compatible store, in place of AWS_ENDPOINT_URL.
    Methods raise StoreError (OSError never); names are paths below the place.
    """

    def __init__(self, place: str, endpoint: str = "", request_s: float = REQUEST_S) -> None:
        self.place = place.rstrip("/") if is_url(place) else place
        self._folder = None if is_url(place) else Path(place)
        self._endpoint, self._request_s = endpoint, request_s
        self._opened: ObjectStore | None = None

    def size(self, name: str) -> int:
        """Bytes of an object."""
        with self._told("be found", name):
            return int(obstore.head(self._store(), name)["size"])

    def read(self, name: str) -> bytes:
        """An object's bytes."""
        if self._absent():
            raise NotThere(f"{self.place} does not exist")
        with self._told("be read", name):
            return bytes(obstore.get(self._store(), name).bytes())

    def ranges(self, name: str, begins: Sequence[int], ends: Sequence[int]) -> list[memoryview]:
        """Parts of an object; neighbours are asked for together. An object that ends before a part does is an error."""
        with self._told("be read", name):
            found = obstore.get_ranges(self._store(), name, starts=begins, ends=ends)
        parts = [memoryview(part).cast("B") for part in found]
        for begin, end, part in zip(begins, ends, parts, strict=True):
            if len(part) < end - begin:
                raise StoreError(f"{self.place}/{name} ends after {begin + len(part):,} bytes, before {end:,}")
        return parts

    def chunks(self, name: str, begin: int = 0) -> Iterator[memoryview]:
        """An object from byte `begin` to its end, a few MB at a time, from one request.

        obstore asks for the rest of a cut answer by itself.
        """
        with self._told("be read", name):
            options: GetOptions = {"range": {"offset": begin}} if begin else {}
            for part in obstore.get(self._store(), name, options=options).stream(min_chunk_size=CHUNK):
                yield memoryview(part).cast("B")

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Puts an object, in place of any older one; `data` is not copied."""
        with self._told("be written", name):
            obstore.put(self._store(), name, data)

    def write_file(self, name: str, path: Path) -> None:
        """Puts a file's content, in parts where it is large."""
        with self._told("be written", name):
            obstore.put(self._store(), name, path)

    def create(self, name: str, data: bytes) -> bool:
        """Puts an object only where there is none; False where there is one."""
        with self._told("be written", name):
            try:
                obstore.put(self._store(), name, data, mode="create")
            except exceptions.AlreadyExistsError:
                return False
        return True

    def names(self, prefix: str = "") -> list[str]:
        """All objects below the folder `prefix`, sorted."""
        if self._absent():
            return []
        with self._told("be listed", prefix):
            return sorted(item["path"] for batch in obstore.list(self._store(), prefix) for item in batch)

    def remove(self, name: str) -> None:
        """One object; nothing happens where there is none."""
        with self._told("be removed", name), suppress(FileNotFoundError):
            obstore.delete(self._store(), name)

    def folders(self, prefix: str) -> dict[str, list[str]]:
        """The folders right below the folder `prefix`, each with its objects, from one listing.

        On a disk also those that hold no object: a killed writer leaves what it had staged, which no listing shows.
        """
        found: dict[str, list[str]] = {}
        for name in self.names(prefix):
            top, inner, _ = name[len(prefix) + 1 :].partition("/")
            if inner:
                found.setdefault(f"{prefix}/{top}", []).append(name)
        with self._told("be listed", prefix):
            here = self._folder / prefix if self._folder else None
            for path in here.iterdir() if here and here.is_dir() else ():
                if path.is_dir():
                    found.setdefault(f"{prefix}/{path.name}", [])
        return found

    def remove_folder(self, folder: str, names: Sequence[str]) -> None:
        """A folder whose objects are `names`; on a disk with all that is in it, and what cannot go is left."""
        with self._told("be removed", folder), suppress(FileNotFoundError):
            if self._folder:
                shutil.rmtree(self._folder / folder, ignore_errors=True)
            elif names:
                obstore.delete(self._store(), names)

    def free(self) -> int | None:
        """Bytes free on the folder's file system; None for a bucket."""
        if self._folder is None:
            return None
        with self._told("be looked at", ""):
            place = self._folder.absolute()
            while not place.exists():
                place = place.parent
            return shutil.disk_usage(place).free

    def _absent(self) -> bool:
        return self._folder is not None and not self._folder.is_dir()

    def _store(self) -> ObjectStore:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> ObjectStore:
        if self._folder:
            return LocalStore(self._folder, automatic_cleanup=True, mkdir=True)
        options: ClientConfig = {"timeout": f"{round(self._request_s * 1000)}ms", "connect_timeout": "10s"}
        if self.place.startswith("http"):  # explicit: from_url takes some hosts for S3 or Azure
            options["allow_http"] = True
            return HTTPStore.from_url(self.place, client_options=options, retry_config=ONCE)
        endpoint = self._endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if self.place.startswith("s3") and endpoint:
            options["allow_http"] = endpoint.startswith("http://")  # said by whoever runs the store
            return from_url(self.place, client_options=options, retry_config=ONCE, endpoint=endpoint)
        return from_url(self.place, client_options=options, retry_config=ONCE)

    @contextmanager
    def _told(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except (OSError, ValueError, NotImplementedError, exceptions.BaseError) as error:
            kind = _kind(error)
            told = kind(f"{self.place}{'/' + name if name else ''} cannot {verb}: {_cause(error)}")
            told.passes = kind is StoreError and self._folder is None and not HOPELESS.search(str(error))
            raise told from error


def _kind(error: Exception) -> type[StoreError]:
    text = str(error)
    if isinstance(error, FileNotFoundError | exceptions.NotFoundError) or "status code: 404" in text:
        return NotThere
    if isinstance(error, exceptions.NotSupportedError) or "non-partial response" in text:
        return NoRanges
    denied = PermissionError | exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
    if isinstance(error, denied) or NO_CREDENTIALS.search(text) or re.search(r"status code: 40[13]", text):
        return Denied
    return StoreError


# Without credentials in the environment the clients ask the cloud's machine metadata, or give up at once.
NO_CREDENTIALS = re.compile(
    r"169\.254\.169\.254|/latest/(api/token|meta-data/iam)|metadata\.google|Account must be specified"
)
# What the server cannot do, or no longer has: 405 and 501, 410, 416 (a range behind the end).
HOPELESS = re.compile(r"status code: (405|410|416|501)|not yet implemented")


def _cause(error: Exception) -> str:
    """The telling words: a server may answer with a page of HTML, and obstore adds its own debug source."""
    text, _, source = str(error).partition("\n\nDebug source")
    if NO_CREDENTIALS.search(text):
        return "no credentials were found in the environment"
    if status := re.search(r"status code: (\d{3} [A-Za-z -]+)", text):
        code = re.search(r"<Code>([A-Za-z]+)</Code>", text)
        return status[1].strip() + (f" ({code[1]})" if code else "")
    if inner := re.findall(r'(?:message|error): "([^"]+)"', source):
        return str(inner[-1]).lower()
    if "TimedOut" in source:
        return "no answer in time"
    if "Incomplete" in source:
        return "the connection was cut"
    line = " ".join((text.splitlines() or [""])[0].split())
    return re.sub(r"^Generic \w+ error: (Error performing .* in \S+ - )?", "", line)[:300]
