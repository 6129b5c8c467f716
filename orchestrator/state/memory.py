"""The newest state of a run in this node's memory: a file under /dev/shm, which outlives the worker that wrote it.

Written like any file, never mapped: memory that is full is then an error and no dead process. Another user may have
made a folder of that name, so one that is not ours alone is not used.
"""

import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.state.packed import Packed
from orchestrator.training.safetensors import Buffer

SHM = Path("/dev/shm")
STATE = re.compile(r"step-(\d+)-(\d+)\.(\d+)")
STALE_S = 24 * 3600.0
LEFT_S = 60.0  # without a write: nobody writes it any more
SETTING = "train.memory_seconds"
Age = tuple[int, int, int]  # number of the lease, attempt, step: of two states the one with the higher is newer


class Memory:
    """The newest packed state of the run `key` on this node; its writers take turns, readers may be many.

    owner: the lease's number and the attempt of who writes. A later owner's state is newer, whatever its step: a group
    that was given up may have trained on, on a node that was cut off. folder: where memory is a file system.
    """

    def __init__(self, key: str, folder: Path = SHM, owner: tuple[int, int] = (0, 0)) -> None:
        self.reason = ""  # why the last put() did not
        self._owner = owner
        self._root = folder
        safe = key if re.fullmatch(r"[\w.-]{1,100}", key, re.ASCII) else hashlib.sha256(key.encode()).hexdigest()[:32]
        self.folder = folder / f"skiplane-{os.geteuid()}-{safe}"

    def put(self, packed: Packed) -> bool:
        """Keeps this state in place of the one before. False where it cannot, and `reason` says why: nothing of it is
        left then, and the one before is still there."""
        try:
            self.reason = self._no_room(packed.nbytes)
            if not self.reason:
                with suppress(FileExistsError):
                    self.folder.mkdir(0o700)
                with _opened(self.folder) as folder:
                    number, attempt = self._owner
                    _write(folder, f"step-{packed.step:09d}-{number:04d}.{attempt:03d}", packed.parts())
        except OSError as error:
            cause = (error.strerror or str(error)).lower()
            self.reason = f"{SETTING}: no copy of the state is kept in {self.folder}: {cause}"
        return not self.reason

    def newest(self) -> tuple[Age, Packed] | None:
        """What is kept, whole and with the right hash, and how new it is; None where there is nothing of the kind."""
        with suppress(OSError), _opened(self.folder) as folder:
            for age, name in _states(folder):
                with suppress(ValueError):
                    return age, Packed.from_bytes(_read(folder, name))
        return None

    def clear(self) -> None:
        """Removes it."""
        with suppress(OSError), _opened(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what runs of ours left here that nobody has written for a day."""
        for path in self._root.glob(f"skiplane-{os.geteuid()}-*"):
            with suppress(OSError), _opened(path) as folder:
                if path != self.folder and time.time() - os.fstat(folder).st_mtime > STALE_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _no_room(self, nbytes: int) -> str:
        free = shutil.disk_usage(self._root).free
        if free >= 2 * nbytes:
            return ""
        return (
            f"{SETTING}: {self._root} has {free / 1e6:.1f} MB free, a copy takes {nbytes / 1e6:.1f} MB and wants twice "
            f"that, so none is kept; make it larger (docker run --shm-size 1g), or set {SETTING} 0"
        )


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A folder that is ours alone, as a descriptor: names below it cannot lead elsewhere. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(None, "it belongs to another user, or others may use it")
        yield folder
    finally:
        os.close(folder)


def _write(folder: int, name: str, parts: Sequence[Buffer]) -> None:
    """The file, whole or not at all, as the only one in the folder."""
    part = f"{name}.{os.getpid()}.part"
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        with open(file, "wb", buffering=0) as out:
            for data in parts:
                view = memoryview(data).cast("B")
                while view:
                    view = view[out.write(view) :]
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise
    _clean(folder, name)


def _clean(folder: int, name: str) -> None:
    """Removes older states, and what a killed writer left. Two nodes of one machine share the folder, and what the
    other one is writing is left alone."""
    for other in set(os.listdir(folder)) - {name}:
        with suppress(FileNotFoundError):
            age = time.time() - os.stat(other, dir_fd=folder, follow_symlinks=False).st_mtime
            if not other.endswith(".part") or age > LEFT_S:
                os.unlink(other, dir_fd=folder)


def _states(folder: int) -> list[tuple[Age, str]]:
    """Whole states by age and name, the newest first."""
    found = [(match, name) for name in os.listdir(folder) if (match := STATE.fullmatch(name))]
    return sorted(((int(m[2]), int(m[3]), int(m[1])), name) for m, name in found)[::-1]


def _read(folder: int, name: str) -> bytearray:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    with open(file, "rb", buffering=0) as source:
        data = bytearray(os.fstat(file).st_size)
        view, done = memoryview(data), 0
        while count := source.readinto(view[done:]):
            done += count
    return data
