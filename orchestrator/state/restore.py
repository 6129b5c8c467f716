"""Which state a group goes on from: the newest of what its nodes hold in memory and of the checkpoint in storage.

Where there is neither, a forked run begins with its donor's checkpoint (train.fork).

One rank reads, all others get its bytes over the process group: replicas are equal, and a bucket is asked once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orchestrator.context import Context
from orchestrator.state.checkpoints import Checkpoints, age_of
from orchestrator.state.fork import read_fork, unpack_fork
from orchestrator.state.memory import Age, Memory
from orchestrator.state.packed import Checkpoint, Packed

NONE: Age = (-1, -1, -1)  # of a node that holds nothing


class CheckpointGone(RuntimeError):
    """What the driver chose is not there any more, or not whole: another try chooses anew."""


@dataclass(frozen=True)
class Restored:
    """The state that all ranks go on from."""

    checkpoint: Checkpoint
    source: str  # "from memory", "from the checkpoint in storage"
    forked: bool = False  # from another run's


def restore(
    checkpoints: Checkpoints, memory: Memory | None, resume: str | None, context: Context, fork: str = ""
) -> Restored | None:
    """Every rank calls it; None where the run begins. resume: the driver's choice among the checkpoints in storage.

    Of two states that are equally new, storage's is taken. fork: train.fork. Raises CheckpointGone where that cannot be
    read; ConfigError or DataError where it is the fork that cannot.
    """
    found = memory.newest() if memory and context.rank == context.node_ranks[0] else None
    age, own = found or (NONE, None)
    held = _gather(age, context)
    if max(held) > (age_of(resume) if resume else NONE):
        rank = held.index(max(held))
        packed = _share(lambda: own, rank, context)
        return Restored(packed.unpack(f"memory of rank {rank}"), "from memory")
    if resume is None and fork:
        return Restored(unpack_fork(fork, _share(lambda: read_fork(fork), 0, context)), f"from {fork}", forked=True)
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


def _gather(age: Age, context: Context) -> list[Age]:
    """Every rank's."""
    if context.world_size == 1:
        return [age]
    ages = torch.zeros(context.world_size, len(age), dtype=torch.int64, device=context.device)
    ages[context.rank] = torch.tensor(age, device=context.device)
    dist.all_reduce(ages)  # a gather that every backend has
    return [(number, attempt, step) for number, attempt, step in ages.tolist()]


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
