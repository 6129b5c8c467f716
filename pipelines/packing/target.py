"""Where a dataset is packed: a folder or a bucket. What is unfinished lies there too, in `.packing`.

    .packing/plan.json             how it is being made, and of how many shards
    .packing/train-000003.done     a shard whose tar is in place: written after it
    dataset.json                   written last: makes it a dataset; then .packing goes

In a folder everything is staged in `.packing`, synchronised and renamed, so that what has a name is whole, also after
a loss of power. A bucket gets whole objects only.
"""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipelines.dataset import UNFINISHED
from pipelines.errors import ClusterError, ConfigError
from pipelines.remote.failures import Denied, NotThere, StoreError
from pipelines.remote.objects import ASKING_S
from pipelines.remote.patience import Patience
from pipelines.remote.store import Store
from pipelines.remote.url import is_url

T = TypeVar("T")
PLAN, LOCK = f"{UNFINISHED}/plan.json", f"{UNFINISHED}/lock"
PART = ".part"
CREDENTIALS = "the environment of this process needs credentials that may write there (AWS_*, GOOGLE_*, AZURE_*)"
BUCKETS = ("s3://", "gs://", "az://")


class Target:
    """A folder, or a URL of s3://, gs:// or az://; goes along to the processes that pack.

    Methods raise ConfigError where it cannot be written, ClusterError where trying again may help.
    """

    def __init__(self, place: str, endpoint: str = "") -> None:
        if is_url(place) and not place.startswith(BUCKETS):
            raise ConfigError(f"--out is {place}; a folder, or a URL of {', '.join(BUCKETS)} is needed")
        self.place, self.endpoint = place, endpoint
        self.folder = None if is_url(place) else Path(place)

    def __reduce__(self) -> tuple[type["Target"], tuple[str, str]]:
        return Target, (self.place, self.endpoint)

    def names(self, below: str = "") -> list[str]:
        """Of what lies in it, or in a folder of it."""
        if self.folder:
            with self._told():
                place = self.folder / below
                return [str(path.relative_to(self.folder)) for path in place.iterdir()] if place.exists() else []
        return self._asked(lambda: self._store.names(below))

    def read(self, name: str) -> bytes | None:
        """None where there is no such file or object."""
        if self.folder:
            with self._told():
                return (self.folder / name).read_bytes() if (self.folder / name).is_file() else None
        return self._if_there(lambda: self._store.read(name))

    def size(self, name: str) -> int | None:
        """Bytes; None where there is no such file or object."""
        if self.folder:
            return (self.folder / name).stat().st_size if (self.folder / name).is_file() else None
        return self._if_there(lambda: self._store.size(name))

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from."""
        return self.size(PLAN) is not None

    def write(self, name: str, data: bytes) -> None:
        """A small file or object, whole or not at all."""
        with self.staged(name) as staged:
            staged.file.write(data)
            staged.keep()

    def create(self, name: str, data: bytes) -> bool:
        """As `write`; False where somebody else was first, in a bucket."""
        if self.folder is None:
            return self._asked(lambda: self._store.create(name, data))
        self.write(name, data)
        return True

    @contextmanager
    def staged(self, name: str) -> Iterator["Staged"]:
        """A file to fill; it is put in its place by `keep`, else gone afterwards."""
        with self._told(), self._scratch(name) as staged:
            yield staged

    def remove(self, name: str) -> None:
        """Nothing happens where there is none."""
        if self.folder:
            with self._told():
                (self.folder / name).unlink(missing_ok=True)
        else:
            self._asked(lambda: self._store.remove(name))

    def forget(self) -> None:
        """Removes what is unfinished."""
        if self.folder:
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
            return
        for name in sorted(self.names(UNFINISHED), key=lambda name: name == PLAN):  # the plan last
            self.remove(name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other packers out of a folder. In a bucket the plan does: all that follow it write the same bytes.

        A folder that this made is gone afterwards if it is empty. Raises ConfigError where another one is at work.
        """
        if not self.folder:
            yield
            return
        with self._told():
            empty_before = self.folder.is_dir() and not any(self.folder.iterdir())
            lock = self._lock(self.folder)
            for part in (self.folder / UNFINISHED).glob(f"*{PART}"):  # of one that was killed
                part.unlink(missing_ok=True)
        try:
            yield
        finally:
            if _is_at(lock, self.folder / LOCK) and not (self.folder / PLAN).exists():
                self.forget()
            os.close(lock)
            if not empty_before:
                with suppress(OSError):
                    self.folder.rmdir()

    def busy(self) -> ConfigError:
        """Another one packs there."""
        return ConfigError(f"--out {self.place} is being packed by another process; wait for it, or name another")

    def _lock(self, folder: Path) -> int:
        while True:
            (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when a packer is killed
                if _is_at(lock, folder / LOCK):  # and not removed by whoever had it
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise self.busy() from None
            os.close(lock)

    @cached_property
    def _store(self) -> Store:
        return Store(self.place, self.endpoint)

    @contextmanager
    def _scratch(self, name: str) -> Iterator["Staged"]:
        if self.folder is None:  # on the local disk, without a name: gone with the process, however it ends
            with tempfile.TemporaryFile() as file:
                path = Path(f"/proc/self/fd/{file.fileno()}")
                yield Staged(file, lambda: self._asked(lambda: self._store.write_file(name, path)))
            return
        place = self.folder / name
        # A name of its own, as Ray may give a task again while the first one is not quite dead.
        part = self.folder / UNFINISHED / f"{place.name}.{uuid.uuid4().hex}{PART}"
        try:
            with part.open("xb", buffering=1 << 20) as file:
                yield Staged(file, lambda: part.replace(place))
        finally:
            part.unlink(missing_ok=True)

    def _if_there(self, request: Callable[[], T]) -> T | None:
        try:
            return self._asked(request)
        except ConfigError as error:
            if isinstance(error.__cause__, NotThere):
                return None
            raise

    def _asked(self, request: Callable[[], T]) -> T:
        try:
            return Patience(ASKING_S)(request)
        except StoreError as error:
            kind = ClusterError if error.passes else ConfigError
            hint = CREDENTIALS if isinstance(error, Denied) else "look at the store, and at --out and --endpoint"
            raise kind(f"--out: {error}; {hint}") from error

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whoever fills a file turns errors of what it reads into its own, so that these are of what is written."""
        try:
            yield
        except OSError as error:
            where = self.place if self.folder else f"{self.place} (its scratch file in {tempfile.gettempdir()})"
            raise ConfigError(
                f"--out {where} cannot be written: {error.strerror}; make room, or name another folder"
            ) from error


class Staged:
    """A file on its way to its place."""

    def __init__(self, file: BinaryIO, place: Callable[[], object]) -> None:
        self.file, self._place = file, place

    def keep(self) -> None:
        """Synchronises it and puts it in its place."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._place()


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
