"""A checkpoint as bytes: `tensors.safetensors` and `progress.json`, with the hashes that make it whole.

Nothing in it is a pickle. The bytes are made once: copied out of the step's tensors into memory that is kept for the
next time, hashed, and written from there to storage, to a node's memory, or to the other ranks.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orchestrator.training import safetensors
from orchestrator.training.safetensors import Buffer, Layout

TENSORS, PROGRESS = "tensors.safetensors", "progress.json"
PICKLED = "tensors.pt"  # as older checkpoints have it
PREFIX = 8  # bytes that say how long the head is
Tensors = Mapping[str, Mapping[str, Tensor]]  # group -> name -> tensor


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
    interval: dict[str, Any] = field(default_factory=dict)  # of the curve's point under way
    told: list[dict[str, Any]] = field(
        default_factory=list
    )  # the newest records of the curves, as the driver heard them

    @property
    def top1(self) -> float | None:
        """Validation top-1 of exactly this state: None in mid-epoch, and after an epoch that was not evaluated."""
        last = self.curve[-1] if self.curve else {}
        begun = self.sums.get("steps") or self.interval.get("steps")
        return last.get("val_top1") if last.get("epoch") == self.epoch and not begun else None


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in memory."""

    name: str
    tensors: dict[str, Any]
    progress: Progress


@dataclass(frozen=True)
class Packed:
    """A checkpoint's files. What they hold may be memory that is used again later: see who made it."""

    step: int
    top1: float | None  # validation top-1 of this state, where it was evaluated
    files: Mapping[str, Buffer]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(len(data) for data in self.files.values())

    @cached_property
    def listed(self) -> dict[str, dict[str, Any]]:
        """File -> bytes and sha256, computed once; the GIL is free meanwhile."""
        return {n: {"bytes": len(data), "sha256": _sha256(data)} for n, data in self.files.items()}

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest says."""
        return {"step": self.step, "top1": self.top1, "files": self.listed}

    def parts(self) -> list[Buffer]:
        """One after the other they are `to_bytes()`; nothing is copied."""
        text = json.dumps(self.about).encode()
        return [len(text).to_bytes(PREFIX, "little"), text, *self.files.values()]

    def to_bytes(self) -> bytearray:
        """All of it in one piece."""
        return bytearray().join(self.parts())

    @classmethod
    def from_bytes(cls, data: Buffer) -> "Packed":
        """Back from `to_bytes()`, whose memory it shares. Raises ValueError where a hash is not what it says."""
        view = memoryview(data).cast("B")
        try:
            end = PREFIX + int.from_bytes(view[:PREFIX], "little")
            about = json.loads(bytes(view[PREFIX:end]))
            files = {}
            for name, expected in about["files"].items():
                files[name], end = view[end : end + expected["bytes"]], end + expected["bytes"]
            packed = cls(about["step"], about["top1"], files)
            packed.check(about["files"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no packed checkpoint: {error}") from error
        return packed

    def check(self, expected: Mapping[str, Any]) -> None:
        """Raises ValueError where the files are not what a manifest's list says."""
        for name, entry in expected.items():
            if self.listed[name]["sha256"] != entry["sha256"]:
                raise ValueError(f"{name} is not what the manifest says")

    def unpack(self, name: str) -> Checkpoint:
        """Tensors and progress; tensors share the memory. ValueError, TypeError and torch's own for what is none."""
        progress = Progress(**json.loads(bytes(self.files[PROGRESS])))
        if PICKLED in self.files:
            stream = io.BytesIO(self.files[PICKLED])
            return Checkpoint(name, torch.load(stream, weights_only=True, map_location="cpu"), progress)
        return Checkpoint(name, safetensors.grouped(self.files[TENSORS]), progress)


class Staging:
    """Memory that tensors are copied into, one set at a time: kept, because fresh pages cost more than the copy.

    Pinned where the tensors are a GPU's: the copy is queued there, before what the next step will change.
    """

    def __init__(self) -> None:
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False
        self._layout: Layout | None = None
        self._copied: torch.Event | None = None

    def fill(self, tensors: Tensors) -> None:
        """Copies them; what was here before is gone."""
        flat = {f"{group}.{name}": t for group, named in tensors.items() for name, t in named.items()}
        layout = Layout.of(flat, tuple(tensors))
        gpu = next((tensor.device for tensor in flat.values() if tensor.is_cuda), None)
        self.reserve(layout.nbytes, pinned=gpu is not None)
        self._layout = layout
        self._memory[: len(layout.head)] = torch.frombuffer(bytearray(layout.head), dtype=torch.uint8)
        self._copy([flat[name] for name in layout.names], layout.views(self._memory), gpu)

    def packed(self, progress: Progress) -> Packed:
        """The files, which share this memory: until it is filled again. Waits for the copy."""
        assert self._layout is not None
        if self._copied is not None:
            self._copied.synchronize()
        data = self._memory[: self._layout.nbytes].numpy().data
        return Packed(progress.step, progress.top1, {TENSORS: data, PROGRESS: json.dumps(asdict(progress)).encode()})

    @property
    def nbytes(self) -> int:
        """How much room there is."""
        return len(self._memory)

    @property
    def pinned(self) -> bool:
        """Whether a GPU copies into it by itself."""
        return self._pinned

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Has that much room from now on, with its pages there."""
        if self.nbytes < nbytes or self._pinned < pinned:
            self._memory, self._pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).fill_(0), pinned

    @torch.no_grad()
    def _copy(self, sources: list[Tensor], targets: list[Tensor], gpu: torch.device | None) -> None:
        if sources:
            torch._foreach_copy_(targets, sources, non_blocking=gpu is not None)
        self._copied = torch.cuda.current_stream(gpu).record_event() if gpu else None


def pack(tensors: Tensors, progress: Progress) -> Packed:
    """Copies them, into memory of its own."""
    staging = Staging()
    staging.fill(tensors)
    return staging.packed(progress)


def _sha256(data: Buffer) -> str:
    return hashlib.sha256(data).hexdigest()
