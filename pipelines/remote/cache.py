"""Files of this node's disk, by content: what was fetched once is there for every worker and every run.

    <folder>/<sha256>         whole and checked; only ever removed, never changed
    <folder>/<sha256>.part    being fetched by whoever holds its lock; without one, left by a killed process

Locks are the kernel's (flock), so whatever is killed lets go. An open entry has a shared lock and is not evicted.
"""

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import ConfigError, DataError
from pipelines.shards import OpenFile

SHARE = 0.9  # of what is free, where no cap is set
POLL_S = 0.02
NAME = re.compile(r"[0-9a-f]{64}")
MEMORY = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Entry:
    """An object that belongs into the cache."""

    where: str  # its URL
    sha256: str
    bytes: int


class NoRoom(Exception):
    """Nothing may be evicted now that would make room."""


Fill = Callable[[int], str]  # writes an object into a file descriptor; returns its sha256
Later = Callable[[str], float]  # sha256 -> how much later than the wanted entry it is needed; not above 0: it stays


class Cache:
    """One folder. cap: bytes it may hold; 0: 90 % of what is free or already its own.

    Raises ConfigError for a folder that cannot be used; in_memory allows one that is a RAM disk.
    """

    def __init__(self, folder: Path, cap: int = 0, *, in_memory: bool = False) -> None:
        self.folder = folder
        self.file_system = _prepared(folder, in_memory)
        self._wrong: dict[str, DataError] = {}  # sha256 -> what was told of bytes that were wrong twice
        free = os.statvfs(folder)
        self.cap = cap or int(SHARE * (free.f_bavail * free.f_frsize + self.used()))

    def used(self) -> int:
        """Bytes of all entries, finished or not."""
        with self._listing():
            return sum(size for _, size, _ in self._listed())

    def __str__(self) -> str:
        return f"{self.folder} ({self.file_system}, at most {self.cap / 1e9:,.1f} GB)"

    def has(self, entry: Entry) -> bool:
        """Whether it is here, whole."""
        return (self.folder / entry.sha256).exists()

    def present(self) -> set[str]:
        """The sha256 of every entry that is here."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as found:
            return {item.name for item in found if NAME.fullmatch(item.name)}
        return set()

    def open(self, entry: Entry) -> OpenFile | None:
        """The entry, held open against eviction; None where it is not here. One of another size is taken out."""
        path = self.folder / entry.sha256
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if (found := os.fstat(file)).st_size != entry.bytes or not stat.S_ISREG(found.st_mode):
            os.close(file)
            self.remove(entry)
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        with suppress(OSError):
            os.utime(file)  # for whoever evicts what was used longest ago
        return OpenFile(str(path), file)

    def forget(self, entry: Entry, file: OpenFile) -> None:
        """Takes an open entry out, unless another one lies in its place by now."""
        path = self.folder / entry.sha256
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.file), path.stat()):
                path.unlink()

    def remove(self, entry: Entry) -> None:
        """Takes an entry out; who has it open keeps it. Raises DataError for what is no file."""
        try:
            (self.folder / entry.sha256).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder / entry.sha256} is no file of the cache; remove it") from error

    def bring(self, entry: Entry, fill: Fill, later: Later, stopped: Callable[[], bool] = bool) -> bool:
        """Fetches an entry that is not here, alone among all processes; whether this one did.

        Raises NoRoom, and DataError where the bytes are wrong twice; what `fill` raises passes through.
        """
        with self._part(entry, stopped) as part:
            if part is None:
                return False
            if entry.sha256 in self._wrong:  # found by a thread of this process that held the lock before
                raise self._wrong[entry.sha256]
            self._reserve(part, entry, later)
            for _ in range(2):
                os.lseek(part, 0, os.SEEK_SET)
                if fill(part) == entry.sha256 and os.fstat(part).st_size == entry.bytes:
                    os.fsync(part)
                    with self._listing():
                        (self.folder / f"{entry.sha256}.part").rename(self.folder / entry.sha256)
                    return True
            self._wrong[entry.sha256] = DataError(
                f"shard {entry.where} does not match its checksum in dataset.json, and did not when it was fetched "
                f"again; copy or pack it again"
            )
            raise self._wrong[entry.sha256]

    @contextmanager
    def _part(self, entry: Entry, stopped: Callable[[], bool]) -> Iterator[int | None]:
        """A new, locked .part file; None where the entry came meanwhile or `stopped` says so. Gone afterwards."""
        path = self.folder / f"{entry.sha256}.part"
        part = None
        while part is None and not self.has(entry) and not stopped():
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared it away
            part = _locked(path)
            if part is None:
                time.sleep(POLL_S)
        if part is not None and self.has(entry):  # between the look and the lock
            path.unlink(missing_ok=True)
            os.close(part)
            part = None
        try:
            yield part
        finally:
            if part is not None:
                if not self.has(entry):
                    path.unlink(missing_ok=True)
                os.close(part)

    @contextmanager
    def _listing(self) -> Iterator[None]:
        """While nobody else lists, reserves or renames: a listing that meets a rename may show a file twice, or not."""
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, part: int, entry: Entry, later: Later) -> None:
        """Takes the entry's bytes on disk, where there is room for them or can be made."""
        with self._listing():
            self._sweep()
            self._make_room(entry.bytes, later)
            try:
                os.posix_fallocate(part, 0, max(entry.bytes, 1))
                os.ftruncate(part, entry.bytes)
            except OSError as error:
                raise NoRoom(f"the disk of data.cache = {self.folder} is full ({error.strerror})") from error

    def _make_room(self, size: int, later: Later) -> None:
        """Evicts what is needed latest until `size` fits. Of what this run does not need, the oldest goes first."""
        listed = list(self._listed())
        excess = sum(taken for _, taken, _ in listed) + size - self.cap
        whole = [(later(name), -used_at, name, taken) for name, taken, used_at in listed if "." not in name]
        if excess > sum(taken for distance, _, _, taken in whole if distance > 0):
            raise self._full()  # before anything is lost for nothing
        for distance, _, name, taken in sorted(whole, reverse=True):
            if excess > 0 and distance > 0 and self._evict(name):
                excess -= taken
        if excess > 0:
            raise self._full()

    def _full(self) -> NoRoom:
        held = f"{self.cap / 1e9:.1f} GB in {self.folder}"
        return NoRoom(f"data.cache_gb allows {held}, and all of it is open or needed sooner")

    def _evict(self, name: str) -> bool:
        """Removes an entry unless somebody has it open."""
        path = self.folder / name
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True

    def _sweep(self) -> None:
        """Removes what killed processes left."""
        for path in self.folder.glob("*.part"):
            part = _locked(path, create=False)
            if part is not None:
                path.unlink(missing_ok=True)
                os.close(part)

    def _listed(self) -> Iterator[tuple[str, int, float]]:
        """(name, bytes, time of last use) of everything."""
        with os.scandir(self.folder) as found:
            for item in found:
                with suppress(FileNotFoundError):
                    if NAME.fullmatch(item.name.removesuffix(".part")):
                        yield item.name, item.stat().st_size, item.stat().st_mtime


def _locked(path: Path, *, create: bool = True) -> int | None:
    """The file, locked for this process alone; None where another one has it, or took it away meanwhile."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(file)
    return None


def _prepared(folder: Path, in_memory: bool) -> str:
    """Makes the folder; the name of its file system."""
    kind = file_system_of(folder)
    if kind in MEMORY and not in_memory:
        raise ConfigError(
            f"data.cache is {folder}, which lies in memory ({kind}): shards there take it from training; name a folder "
            f"on a disk, or say data.cache_in_memory true"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"data.cache is {folder}, which cannot be made: {error.strerror}; name another folder"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"data.cache is {folder}, which cannot be written; name another folder")
    return kind


def file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, such as ext4 or tmpfs (proc(5), mountinfo)."""
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")  # a space is \040 there
        mounts[Path(point)] = right.split()[0]
    real = path.resolve()
    return next((mounts[place] for place in (real, *real.parents) if place in mounts), "?")
