"""Checkpoints of one run: `checkpoints/step-000000123-0007.002/` with tensors, progress and, written last, a manifest.

The manifest's sizes and hashes make a checkpoint whole; one without a manifest, or with other bytes than it says, is
passed over with a warning for the one before. The numbers behind the step are the writer's: the lease's fencing number
and the attempt, so that two writers never share a folder. Folders without them are of older versions.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch

from orchestrator.state.packed import Checkpoint, Packed
from orchestrator.state.storage import Storage
from orchestrator.training.safetensors import Buffer
from pipelines.errors import ClusterError

T = TypeVar("T")
FOLDER, MANIFEST = "checkpoints", "manifest.json"
NAME = re.compile(rf"{FOLDER}/step-(\d+)(?:-(\d+)\.(\d+))?")
# What reading a checkpoint raises whose bytes are not what they should be.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, UnpicklingError)
MARGIN = 1.05  # free bytes that a checkpoint wants: its own and what the file system needs for them


@dataclass(frozen=True)
class Owner:
    """Who writes. check: raises once the run is somebody else's; asked just before a checkpoint becomes whole."""

    number: int = 0  # the lease's fencing number: rises with every driver
    attempt: int = 0  # of that driver
    check: Callable[[], None] = lambda: None


class Checkpoints:
    """The checkpoints in one run's storage. `warn` hears of each one that is passed over."""

    def __init__(
        self, storage: Storage, keep: int, warn: Callable[[str], None] = print, owner: Owner | None = None
    ) -> None:
        self._storage, self._keep, self._warn = storage, keep, warn
        self._owner = owner or Owner()
        self._known: dict[str, float | None] = {}  # top-1 by name; a manifest never changes

    def save(self, packed: Packed) -> str:
        """Writes one checkpoint, then removes all but the newest `keep` and the best. Returns its name.

        Raises ClusterError where it cannot be written or there is no room, and what the owner's check raises. Then
        nothing of it is left, and those that were there still are.
        """
        folder = f"{FOLDER}/step-{packed.step:09d}-{self._owner.number:04d}.{self._owner.attempt:03d}"
        self._check_room(packed)
        try:
            self._write(folder, packed)
        except BaseException:
            with suppress(ClusterError):
                self._discard(folder)
            raise
        self._known[folder] = packed.top1
        self._prune(folder)
        return folder

    def names(self) -> list[str]:
        """Folders that have a manifest, oldest first."""
        return _whole(self._storage.folders(FOLDER))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose bytes are what its manifest says; None where there is none."""
        return self._first(reversed(self.names()))

    def best(self) -> Checkpoint | None:
        """Of those that are kept and whole, the one with the highest validation top-1; None where none has one."""
        return self._first(self._by_top1(self.names()))

    def best_name(self) -> str | None:
        """The best one's name by what the manifests say alone; None where no state has a top-1."""
        return next(iter(self._by_top1(self.names())), None)

    def read(self, name: str) -> Packed | None:
        """One checkpoint's files; None, with a warning, where they are not what the manifest says."""
        return self._unless_damaged(name, lambda: self.verified(name))

    def load(self, name: str) -> Checkpoint | None:
        """One checkpoint; None, with a warning, where it is damaged."""
        return self._unless_damaged(name, lambda: self.verified(name).unpack(name))

    def verified(self, name: str) -> Packed:
        """One checkpoint's files. Raises one of DAMAGE where they are not what the manifest says."""
        manifest = self._manifest(name)
        packed = Packed(_key(name)[0], manifest.get("top1"), {f: self._read(f"{name}/{f}") for f in manifest["files"]})
        packed.check(manifest["files"])
        return packed

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(self, folder: str, packed: Packed) -> None:
        for name, data in packed.files.items():
            self._put(f"{folder}/{name}", data)
        manifest = json.dumps({"number": self._owner.number, **packed.about}).encode()
        self._owner.check()
        self._put(f"{folder}/{MANIFEST}", manifest)

    def _put(self, name: str, data: Buffer) -> None:
        try:
            self._storage.write(name, data)
        except ClusterError as error:
            raise ClusterError(f"{error}; {self._last_good()}") from error

    def _check_room(self, packed: Packed) -> None:
        free, needed = self._storage.free(), packed.nbytes
        if free is not None and free < MARGIN * needed:
            raise ClusterError(
                f"cluster.storage: {self._storage.place} has {_mb(free)} free, a checkpoint takes {_mb(needed)}; free "
                f"some, or move the run to a larger cluster.storage; {self._last_good()}"
            )

    def _last_good(self) -> str:
        with suppress(ClusterError):
            if names := self.names():
                return f"the last good checkpoint is {names[-1]}"
        return "there is no checkpoint before it"

    def _discard(self, folder: str) -> None:
        """A folder that did not become whole."""
        names = self._storage.folders(FOLDER).get(folder, [])
        if f"{folder}/{MANIFEST}" not in names:
            self._storage.remove_folder(folder, names)

    # -- removing ------------------------------------------------------------------------------------------------

    def _prune(self, written: str) -> None:
        """Removes what is not kept, and what killed writers left; a later owner's folders are its own business."""
        folders = self._storage.folders(FOLDER)
        whole = _whole(folders)
        kept = {written, *whole[-self._keep :], *self._by_top1(whole)[:1]}
        for name in whole:
            if name not in kept:
                self._storage.remove(f"{name}/{MANIFEST}")  # first: a half-deleted one must not look whole
                self._storage.remove_folder(name, folders[name])
        for name in set(folders) - set(whole) - {written}:
            if NAME.fullmatch(name) and _key(name)[1:] <= (self._owner.number, self._owner.attempt):
                self._storage.remove_folder(name, folders[name])

    # -- reading -------------------------------------------------------------------------------------------------

    def _unless_damaged(self, name: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except DAMAGE as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._warn(f"checkpoint {name} is damaged ({cause}); using the one before it")
            return None

    def _first(self, names: Iterable[str]) -> Checkpoint | None:
        return next((found for found in map(self.load, names) if found), None)

    def _by_top1(self, names: Iterable[str]) -> list[str]:
        """Those with a validation top-1, highest first; of equal ones the earliest step."""
        scores = {name: self._top1(name) for name in names}
        return sorted((n for n in scores if scores[n] is not None), key=lambda n: (-(scores[n] or 0.0), _key(n)))

    def _top1(self, name: str) -> float | None:
        if name not in self._known:
            try:
                self._known[name] = self._manifest(name).get("top1")
            except (ValueError, AttributeError):
                self._known[name] = None  # damaged: latest() says so
        return self._known[name]

    def _manifest(self, name: str) -> dict[str, Any]:
        return json.loads(self._storage.read(f"{name}/{MANIFEST}") or b"")

    def _read(self, name: str) -> bytes:
        data = self._storage.read(name)
        if data is None:
            raise ValueError(f"{name.rsplit('/', 1)[1]} is missing")
        return data


def step_of(name: str) -> int:
    """The global step of a checkpoint's name."""
    return _key(name)[0]


def age_of(name: str) -> tuple[int, int, int]:
    """(number, attempt, step): of two states the one with the higher is newer, see memory.Age."""
    step, number, attempt = _key(name)
    return number, attempt, step


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the sorted names, shapes and bytes of a state dict, buffers included."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(name: str) -> tuple[int, int, int]:
    """(step, number, attempt), in which order names are; those without a writer come first."""
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no checkpoint's name")
    step, number, attempt = found.groups(default="-1")
    return int(step), int(number), int(attempt)


def _whole(folders: Mapping[str, list[str]]) -> list[str]:
    whole = [name for name, files in folders.items() if NAME.fullmatch(name) and f"{name}/{MANIFEST}" in files]
    return sorted(whole, key=_key)


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
