"""Which state a group goes on from: the newest of what its nodes hold in memory and of the checkpoint in storage.

One rank reads, all others get its bytes over the process group: replicas are equal, and a bucket is asked once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orchestrator.context import Context
from orchestrator.state.checkpoints import Checkpoints, step_of
from orchestrator.state.memory import Memory
from orchestrator.state.packed import Checkpoint, Packed

NONE = -1  # step of a node that holds nothing


class CheckpointGone(RuntimeError):
    """What the driver chose is not there any more, or not whole: another try chooses anew."""


@dataclass(frozen=True)
class Restored:
    """The state that all ranks go on from."""

    checkpoint: Checkpoint
    source: str  # "memory of NODE", "the checkpoint in storage"


def restore(checkpoints: Checkpoints, memory: Memory | None, resume: str | None, context: Context) -> Restored | None:
    """Every rank calls it; None where the run begins. resume: the driver's choice among the checkpoints in storage.

    Of two states that are equally new, storage's is taken. Raises CheckpointGone where that cannot be read.
    """
    own = memory.newest() if memory and context.rank == context.node_ranks[0] else None
    held = _gather(own.step if own else NONE, context)
    stored = step_of(resume) if resume else NONE
    if max(held) > stored:
        rank = held.index(max(held))
        packed = _share(lambda: own, rank, context)
        return Restored(packed.unpack(f"memory of rank {rank}"), "from memory")
    if resume is None:
        return None
    return Restored(
        _share(lambda: _read(checkpoints, resume), 0, context).unpack(resume), "from the checkpoint in storage"
    )


def _read(checkpoints: Checkpoints, name: str) -> Packed:
    packed = checkpoints.read(name)
    if packed is None:
        raise CheckpointGone(f"checkpoint {name} cannot be read any more")
    return packed


def _gather(step: int, context: Context) -> list[int]:
    """Every rank's step."""
    if context.world_size == 1:
        return [step]
    steps = torch.zeros(context.world_size, dtype=torch.int64, device=context.device)
    steps[context.rank] = step
    dist.all_reduce(steps)  # a gather that every backend has
    return [int(value) for value in steps.tolist()]


def _share(read: Callable[[], Packed | None], source: int, context: Context) -> Packed:
    """What `source` reads, on every rank."""
    if context.world_size == 1:
        packed = read()
        assert packed is not None
        return packed
    data = torch.empty(0, dtype=torch.uint8)
    if context.rank == source:
        packed = read()
        assert packed is not None
        data = torch.frombuffer(packed.to_bytes(), dtype=torch.uint8).to(context.device)
    size = torch.tensor([len(data)], device=context.device)
    dist.broadcast(size, source)
    if context.rank != source:
        data = torch.empty(int(size), dtype=torch.uint8, device=context.device)
    dist.broadcast(data, source)
    return Packed.from_bytes(memoryview(data.cpu().numpy()))  # type: ignore[arg-type]
