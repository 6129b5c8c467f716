"""Space for checkpoints, looked at before a run starts: a disk that fills up later ends it."""

import os
from contextlib import suppress
from pathlib import Path

from orchestrator.plan import in_bytes
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError

BESIDES = 2  # checkpoints beside the newest ones that are kept: the best one, and the one that is being written
SMALL = 1_000_000  # bytes of a checkpoint that are no weights: BatchNorm's averages, sums, the curve


def checkpoint_bytes(parameters: int) -> int:
    """Of one checkpoint: float32 weights and momentum. ResNet-50, 25.6 million parameters: 205 MB."""
    return 8 * parameters + SMALL


def lacking(parameters: int, keep: int, held: int, free: int) -> int:
    """Bytes that have to be made free so that a run's checkpoints fit; 0 where they do.

    held: bytes that its checkpoints take already. free: bytes free where they lie.
    """
    return max(0, (keep + BESIDES) * checkpoint_bytes(parameters) - held - free)


def check_space(storage: Storage, parameters: int, keep: int) -> None:
    """Raises ClusterError where a folder has too little space for a run's checkpoints; a bucket has no end."""
    if (free := storage.free()) is None:
        return
    held = _held(storage)
    if lacking(parameters, keep, held, free):
        each, count = checkpoint_bytes(parameters), keep + BESIDES
        raise ClusterError(
            f"cluster.storage has {in_bytes(free)} free in {storage.place}; {count} checkpoints of {in_bytes(each)} "
            f"(train.keep = {keep}, the best one, and the one being written) need {in_bytes(count * each - held)}"
            f"{' more' if held else ''}; make space, lower train.keep, or name another folder"
        )


def _held(storage: Storage) -> int:
    """Bytes of the run's checkpoints; others may be removing some."""
    total = 0
    for folder, _, names in os.walk(Path(storage.place) / "checkpoints"):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_size
    return total
