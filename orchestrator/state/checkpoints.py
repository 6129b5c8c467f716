"""Checkpoints of one run: `checkpoints/step-000000123/` with tensors, progress and, written last, a manifest.

The manifest's sizes and hashes make a checkpoint whole; one without a manifest, or with other bytes than it says, is
passed over with a warning for the one before. Nothing in it is a pickle: `torch.load(weights_only=True)` reads it.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pickle import UnpicklingError
from typing import Any

import torch

from orchestrator.state.storage import Storage

MANIFEST = "manifest.json"
Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where a run is: the data's whole state is `step`; the rest are sums that continue."""

    step: int  # global steps done
    epoch: int  # epochs done or begun: step // steps_per_epoch
    digest: int  # data digest so far, over all ranks
    sums: dict[str, Any]  # of the epoch under way
    total: dict[str, Any]  # of all steps
    curve: list[dict[str, float]]  # one record an evaluated epoch
    bad: int  # samples replaced so far, over all ranks
    seconds: float  # of training, over all attempts


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in memory."""

    name: str
    tensors: dict[str, Any]
    progress: Progress


class Checkpoints:
    """The checkpoints in one run's storage. `warn` hears of each one that is passed over."""

    def __init__(self, storage: Storage, keep: int, warn: Callable[[str], None] = print) -> None:
        self._storage, self._keep, self._warn = storage, keep, warn

    def save(self, tensors: Tensors, progress: Progress) -> str:
        """Writes one checkpoint, then removes those beyond `keep`. Returns its name."""
        folder = f"checkpoints/step-{progress.step:09d}"
        files = {"tensors.pt": _pack(tensors), "progress.json": json.dumps(asdict(progress)).encode()}
        for name, data in files.items():
            self._storage.write(f"{folder}/{name}", data)
        listed = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        self._storage.write(f"{folder}/{MANIFEST}", json.dumps({"files": listed}).encode())
        self._prune()
        return folder

    def names(self) -> list[str]:
        """Folders that have a manifest, oldest first."""
        return [n.removesuffix(f"/{MANIFEST}") for n in self._storage.names("checkpoints") if n.endswith(MANIFEST)]

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose bytes are what its manifest says; None where there is none."""
        for name in reversed(self.names()):
            if found := self.load(name):
                return found
        return None

    def load(self, name: str) -> Checkpoint | None:
        """One checkpoint; None, with a warning, where it is damaged."""
        try:
            files = self._verified(name)
            progress = Progress(**json.loads(files["progress.json"]))
            tensors = torch.load(io.BytesIO(files["tensors.pt"]), weights_only=True, map_location="cpu")
        except (ValueError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._warn(f"checkpoint {name} is damaged ({cause}); using the one before it")
            return None
        return Checkpoint(name, tensors, progress)

    def _verified(self, name: str) -> dict[str, bytes]:
        manifest = json.loads(self._storage.read(f"{name}/{MANIFEST}") or b"")
        files = {}
        for file, expected in manifest["files"].items():
            data = self._storage.read(f"{name}/{file}")
            if data is None or _sha256(data) != expected["sha256"]:
                raise ValueError(f"{file} is {'missing' if data is None else 'not what the manifest says'}")
            files[file] = data
        return files

    def _prune(self) -> None:
        for name in self.names()[: -self._keep]:
            self._storage.remove(f"{name}/{MANIFEST}")  # first: a half-deleted one must not look whole
            self._storage.remove_all(name)


class BackgroundSaver:
    """Saves on a thread of its own, one at a time: a step waits for the copy of its tensors, not for the disk."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[str] | None = None

    def save(self, tensors: Tensors, progress: Progress, then: Callable[[str], None]) -> None:
        """Copies the tensors, waits for the save before this one, and returns; `then` hears the name when it is whole.

        Raises what the save before this one raised.
        """
        copied = _copy(tensors)
        self.wait()
        self._last = self._pool.submit(self._run, copied, progress, then)

    def wait(self) -> None:
        """Until the last save is whole; raises what it raised."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def close(self) -> None:
        """Waits and ends the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _run(self, tensors: Tensors, progress: Progress, then: Callable[[str], None]) -> str:
        name = self._checkpoints.save(tensors, progress)
        then(name)
        return name


def step_of(name: str) -> int:
    """The global step of a checkpoint's name."""
    return int(name.rsplit("-", 1)[1])


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the sorted names, shapes and bytes of a state dict, buffers included."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _pack(tensors: Tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
