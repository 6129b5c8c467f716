"""Which state a group goes on from; one rank reads, all have it."""

from pathlib import Path

import pytest
import torch

from orchestrator.context import LocalContext
from orchestrator.state.checkpoints import Checkpoints, Owner
from orchestrator.state.memory import Memory
from orchestrator.state.packed import Progress, pack
from orchestrator.state.restore import CheckpointGone, restore
from orchestrator.state.storage import Storage
from tests.ranks import on_ranks


def state(step):
    progress = Progress(step, 0, step, {}, {}, [], 0, 1.0)
    return pack({"model": {"w": torch.full((1000,), float(step))}, "momentum": {}}, progress)


def filled(folder, stored=(), held=(), owner=(0, 0)):
    """Saves these steps into storage, and into the memory of each rank (0 = nothing); the newest stored one's name."""
    checkpoints = Checkpoints(Storage(f"{folder}/run"), keep=9, warn=lambda _: None)
    names = [checkpoints.save(state(step)) for step in stored]
    for rank, step in enumerate(held):
        (Path(folder) / f"shm{rank}").mkdir(parents=True)
        if step:
            assert Memory("key", Path(folder) / f"shm{rank}", owner).put(state(step))
    return names[-1] if names else None


def restored(rank, world_size, folder, name, fork=""):
    """(step, where it is from, the weight) on this rank."""
    memory = Memory("key", Path(folder) / f"shm{rank}")
    checkpoints = Checkpoints(Storage(f"{folder}/run"), keep=9, warn=lambda _: None)
    found = restore(checkpoints, memory, name, Apart(rank, world_size), fork)
    if found is None:
        return None
    return found.checkpoint.progress.step, found.source, float(found.checkpoint.tensors["model"]["w"].mean())


class Apart(LocalContext):
    """Each rank is on a node of its own."""

    @property
    def node_ranks(self):
        return range(self.rank, self.rank + 1)


MEMORY, STORAGE = "from memory", "from the checkpoint in storage"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "held", "expected"),
    [
        ((), (0, 0, 0), None),  # the beginning
        ((5, 10), (0, 0, 0), (10, STORAGE)),
        ((10,), (0, 12, 11), (12, MEMORY)),  # of a survivor, the newest
        ((10,), (10, 0, 9), (10, STORAGE)),  # no newer: storage is everybody's
        ((), (0, 0, 3), (3, MEMORY)),
    ],
)
def test_all_ranks_get_the_newest_of_memory_and_storage(tmp_path, stored, held, expected):
    name = filled(tmp_path, stored, held)
    wanted = None if expected is None else (*expected, float(expected[0]))
    assert on_ranks(3, restored, str(tmp_path), name) == [wanted] * 3


def test_a_single_rank_needs_no_group(tmp_path):
    name = filled(tmp_path, (5,), (7,))
    assert restored(0, 1, tmp_path, name) == (7, MEMORY, 7.0)


def test_a_damaged_copy_in_memory_is_none(tmp_path):
    name = filled(tmp_path, (5,), (7,))
    [file] = (tmp_path / "shm0").glob("*/step-*")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert restored(0, 1, tmp_path, name) == (5, STORAGE, 5.0)


def test_a_copy_of_a_group_that_was_given_up_is_older_whatever_its_step(tmp_path):
    """It trained on alone, on a node that was cut off, while the next group saved step 5."""
    checkpoints = Checkpoints(Storage(f"{tmp_path}/run"), keep=9, owner=Owner(1, 3))
    name = checkpoints.save(state(5))
    filled(tmp_path, held=(7,), owner=(1, 2))
    assert restored(0, 1, tmp_path, name) == (5, STORAGE, 5.0)
    assert Memory("key", tmp_path / "shm0", (1, 3)).put(state(6))
    assert restored(0, 1, tmp_path, name) == (6, MEMORY, 6.0)


def test_a_checkpoint_that_vanished_meanwhile_ends_the_group_and_not_the_run(tmp_path):
    name = filled(tmp_path, (5,))
    Storage(f"{tmp_path}/run").remove(f"{name}/progress.json")
    with pytest.raises(CheckpointGone, match=r"checkpoint .*step-000000005.* cannot be read any more"):
        restored(0, 1, tmp_path, name)


@pytest.mark.slow
def test_a_forked_run_begins_where_its_donor_stands_on_all_ranks(tmp_path):
    """One rank reads it; what the run has of its own, in memory or in storage, comes first."""
    fork = f"{tmp_path}/donor/{Checkpoints(Storage(f'{tmp_path}/donor'), keep=9).save(state(8))}"
    filled(tmp_path, held=(0, 0, 0))
    assert on_ranks(3, restored, str(tmp_path), None, fork) == [(8, f"from {fork}", 8.0)] * 3
    own = filled(tmp_path / "own", stored=(2,), held=(0, 0, 0))
    assert on_ranks(3, restored, str(tmp_path / "own"), own, fork) == [(2, STORAGE, 2.0)] * 3
    filled(tmp_path / "copied", held=(0, 1, 0))
    assert on_ranks(3, restored, str(tmp_path / "copied"), None, "/gone/checkpoints/step-1") == [(1, MEMORY, 1.0)] * 3
