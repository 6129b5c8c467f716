"""The newest state in a node's memory: whole or not there, nobody else's, and never a crash where there is no room."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from random import Random

import pytest
import torch

from orchestrator.state import memory as memories
from orchestrator.state.memory import Memory
from orchestrator.state.packed import Packed, Progress, pack

ROOT = Path(__file__).parent.parent


def packed(step, size=1000):
    at = Progress(step=step, epoch=0, digest=0, sums={}, total={}, curve=[], bad=0, seconds=0.0)
    return pack({"model": {"w": torch.full((size,), float(step))}, "momentum": {}}, at)


def inside(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_kept_and_nothing_else(tmp_path):
    memory = Memory("a", tmp_path)
    assert memory.newest() is None
    for step in (5, 10, 7):  # a group may go on from an older state: what was put last counts
        assert memory.put(packed(step))
        assert memory.reason == ""
    (*_, step), found = Memory("a", tmp_path).newest()
    assert step == 7
    assert (found.step, inside(memory.folder)) == (7, ["step-000000007-0000.000"])
    assert found.files == packed(7).files
    assert Memory("b", tmp_path).newest() is None
    memory.clear()
    assert inside(tmp_path) == []


def test_folder_and_file_are_for_us_alone(tmp_path):
    before = os.umask(0)
    try:
        memory = Memory("a", tmp_path)
        memory.put(packed(1))
    finally:
        os.umask(before)
    assert memory.folder.name == f"skiplane-{os.geteuid()}-a"
    assert stat.S_IMODE(memory.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((memory.folder / "step-000000001-0000.000").stat().st_mode) == 0o600


def open_to_others(folder):
    folder.mkdir()
    folder.chmod(0o750)


def a_link(folder):
    place = folder.parent / "elsewhere"
    place.mkdir(mode=0o700)
    folder.symlink_to(place)


def of_another_user(folder):
    folder.mkdir(mode=0o700)
    if os.geteuid():
        pytest.skip("only root can make a folder that belongs to another user")
    os.chown(folder, 12345, -1)


def a_file(folder):
    folder.write_text("")


@pytest.mark.parametrize("make", [open_to_others, a_link, of_another_user, a_file])
def test_a_folder_that_is_not_ours_alone_is_not_used(tmp_path, make):
    """Whoever made it could read the weights, or give us others."""
    memory, theirs = Memory("a", tmp_path), Memory("theirs", tmp_path)
    make(memory.folder)
    assert theirs.put(packed(1))
    state = theirs.folder / "step-000000001-0000.000"
    if memory.folder.is_dir():
        shutil.copy(state, memory.folder)
    before = sorted(tmp_path.rglob("*"))
    assert memory.newest() is None
    assert not memory.put(packed(2))
    assert memory.reason.startswith(f"train.memory_seconds: no copy of the state is kept in {memory.folder}: ")
    memory.clear()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["../../etc", "s3://bucket/run", "", "x" * 300, "a b"])
def test_any_key_is_one_folder(tmp_path, key):
    memory = Memory(key, tmp_path)
    assert memory.put(packed(1))
    assert memory.folder.parent == tmp_path
    assert Memory(key + "!", tmp_path).newest() is None


def cut(data):
    return data[:-1]


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def head_only(data):
    return data[:5]


def nothing(data):
    return b""


def other(data):
    return b"\x0f" + bytes(7) + b'["no manifest"]' + data


@pytest.mark.parametrize("damage", [cut, flip, head_only, nothing, other])
def test_what_is_damaged_is_not_there(tmp_path, damage):
    memory = Memory("a", tmp_path)
    memory.put(packed(1))
    file = memory.folder / "step-000000001-0000.000"
    file.write_bytes(damage(file.read_bytes()))
    assert memory.newest() is None
    with pytest.raises(ValueError, match="no packed checkpoint: "):
        Packed.from_bytes(file.read_bytes())


def test_one_piece_and_back(tmp_path):
    first = packed(3)
    data = first.to_bytes()
    again = Packed.from_bytes(memoryview(torch.frombuffer(data, dtype=torch.uint8).clone().numpy()))
    assert (again.step, again.top1, again.listed) == (3, None, first.listed)
    assert torch.equal(again.unpack("x").tensors["model"]["w"], torch.full((1000,), 3.0))


# -- room --------------------------------------------------------------------------------------------------------------


def test_too_little_room_is_a_sentence(small_disk):
    """As in a container, whose /dev/shm has 64 MB unless it is told otherwise."""
    memory = Memory("a", small_disk)
    assert memory.put(packed(1))
    assert not memory.put(packed(2, 4_000_000))
    assert memory.reason == (
        f"train.memory_seconds: {small_disk} has 25.2 MB free, a copy takes 16.0 MB and wants twice that, so none is "
        f"kept; make it larger (docker run --shm-size 1g), or set train.memory_seconds 0"
    )
    assert (memory.newest()[1].step, inside(memory.folder)) == (1, ["step-000000001-0000.000"])


def test_room_that_goes_while_it_is_written_is_an_error_and_no_signal(small_disk, monkeypatch):
    memory = Memory("a", small_disk)
    assert memory.put(packed(1))
    monkeypatch.setattr(Memory, "_no_room", lambda *_: "")  # it was there when it was looked at
    assert not memory.put(packed(2, 8_000_000))
    assert memory.reason.endswith(f"is kept in {memory.folder}: no space left on device")
    assert (memory.newest()[1].step, inside(memory.folder)) == (1, ["step-000000001-0000.000"])


def test_no_memory_file_system_is_a_sentence(tmp_path):
    memory = Memory("a", tmp_path / "none")
    assert not memory.put(packed(1))
    assert memory.reason.endswith("no such file or directory")
    assert memory.newest() is None
    memory.clear()
    memory.sweep()


# -- others, and those before us ---------------------------------------------------------------------------------------


def test_what_nobody_touched_for_a_day_is_swept(tmp_path):
    old, live, own = (Memory(key, tmp_path) for key in ("old", "live", "own"))
    for memory in (old, live, own):
        memory.put(packed(1))
    foreign = tmp_path / f"skiplane-{os.geteuid() + 1}-x"
    foreign.mkdir(0o700)
    for folder in (old.folder, own.folder, foreign):
        os.utime(folder, (0, 0))
    own.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {live.folder.name, own.folder.name, foreign.name}


WRITER = """
import sys, torch
from pathlib import Path
from orchestrator.state import memory as memories
from orchestrator.state.memory import Memory
from tests.test_memory import packed

memory, states = Memory("a", Path(sys.argv[1])), [packed(step, 2_000_000) for step in (1, 2)]
memory.put(states[0])
print("begins", flush=True)
while True:
    for state in states:
        assert memory.put(state)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_state(tmp_path, monkeypatch):
    memory, random = Memory("a", tmp_path), Random(0)
    for _ in range(8):
        arguments = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout.readline() == b"begins\n"
            threading.Event().wait(random.uniform(0, 0.05))
            writer.kill()
        _, found = memory.newest()
        assert found.step in (1, 2)
        assert torch.equal(found.unpack("x").tensors["model"]["w"], torch.full((2_000_000,), float(found.step)))
    monkeypatch.setattr(memories, "LEFT_S", -1.0)  # nobody writes these halves any more
    assert memory.put(packed(3))
    assert inside(memory.folder) == ["step-000000003-0000.000"]


def test_a_later_owners_state_is_newer_whatever_its_step(tmp_path):
    """Two files at once: the first writer was killed before it removed the older one."""
    first = Memory("a", tmp_path, (1, 2))
    assert first.put(packed(300))
    kept = first.folder / "step-000000300-0001.002"
    copy = kept.read_bytes()
    assert Memory("a", tmp_path, (1, 3)).put(packed(160))
    kept.write_bytes(copy)
    age, found = first.newest()
    assert (age, found.step) == ((1, 3, 160), 160)


def test_what_another_node_of_this_machine_is_writing_is_left_alone(tmp_path):
    memory = Memory("a", tmp_path)
    assert memory.put(packed(1))
    half = memory.folder / "step-000000002.77.part"
    half.write_bytes(b"half")
    assert memory.put(packed(2))
    assert inside(memory.folder) == ["step-000000002-0000.000", half.name]
