"""The saver's thread: a step waits for a copy and never for storage, and what was copied is what is written."""

import threading
from contextlib import suppress

import pytest
import torch

from orchestrator.state.checkpoints import Checkpoints, step_of
from orchestrator.state.memory import Memory
from orchestrator.state.packed import TENSORS, Progress
from orchestrator.state.saver import BackgroundSaver
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError


def progress(step):
    return Progress(step=step, epoch=0, digest=0, sums={}, total={}, curve=[], bad=0, seconds=0.0)


def tensors(value, size=1000):
    return {"model": {"w": torch.full((size,), float(value))}, "momentum": {}}


class Held(Storage):
    """Storage whose writes of tensors wait until they are let go."""

    def __init__(self, place):
        super().__init__(place)
        self.begun, self.let_go = threading.Semaphore(0), threading.Semaphore(0)

    def write(self, name, data):
        if name.endswith(TENSORS):
            self.begun.release()
            assert self.let_go.acquire(timeout=60)
        super().write(name, data)


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "run"))


@pytest.fixture
def held(tmp_path):
    return Held(str(tmp_path / "run"))


def values(storage):
    """Step -> the one value its weights have."""
    checkpoints = Checkpoints(storage, keep=9, warn=pytest.fail)
    found = {step_of(name): checkpoints.load(name).tensors["model"]["w"].unique() for name in checkpoints.names()}
    return {step: value.tolist() for step, value in found.items()}


def test_it_keeps_what_was_true_when_it_was_asked(storage):
    state, saved = tensors(0), []
    saver = BackgroundSaver(Checkpoints(storage, keep=2))
    saver.save(state, progress(1), saved.append)
    state["model"]["w"] += 1  # the next step
    saver.close()
    assert [step_of(name) for name in saved] == [1]
    assert values(storage) == {1: [0.0]}


def test_it_never_waits_for_storage_and_the_newest_is_next(held):
    """One is under way and cannot end; of those that come meanwhile the last one is written, whole."""
    saved, said = [], []
    saver = BackgroundSaver(Checkpoints(held, keep=9), say=said.append)
    saver.save(tensors(1), progress(1), saved.append)
    assert held.begun.acquire(timeout=60)
    for step in range(2, 7):
        saver.save(tensors(step), progress(step), saved.append)
    assert saved == []
    for _ in range(2):
        held.let_go.release()
    saver.close()
    assert [step_of(name) for name in saved] == [1, 6]
    assert values(held) == {1: [1.0], 6: [6.0]}  # no copy was put where another was being written from
    assert len(said) == 1  # of four
    assert said[0].startswith("storage takes longer than checkpoints are apart: the one of step 2 was left out for")


def test_memory_for_copies_is_used_again(held, monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    saver = BackgroundSaver(Checkpoints(held, keep=9))
    for step in range(1, 9):
        saver.save(tensors(step), progress(step), lambda _: None)
        assert held.begun.acquire(timeout=60)
        held.let_go.release()
        saver.wait()
    saver.close()
    assert len([a for a in made if a[0]]) == 2  # one that is written and one that is filled
    assert values(held) == {step: [float(step)] for step in range(1, 9)}


def test_a_state_that_grows_finds_room(storage):
    """Momentum is there from the first step on."""
    saver = BackgroundSaver(Checkpoints(storage, keep=9))
    for step in range(1, 6):
        saver.save(tensors(step, 10**step), progress(step), lambda _: None)
        saver.wait()
    saver.close()
    assert values(storage) == {step: [float(step)] for step in range(1, 6)}


def test_copies_go_to_memory_alone_and_saves_go_there_too(held, tmp_path):
    memory = Memory("a", tmp_path)
    saver = BackgroundSaver(Checkpoints(held, keep=9), memory)
    saver.copy(tensors(1), progress(1))
    saver.wait()
    assert memory.newest()[1].step == 1
    saver.save(tensors(2), progress(2), lambda _: None)
    assert held.begun.acquire(timeout=60)
    assert memory.newest()[1].step == 2  # before storage has it
    saver.copy(tensors(3), progress(3))
    saver.copy(tensors(4), progress(4))  # in place of the one that waits
    saver.save(tensors(5), progress(5), lambda _: None)  # so is this
    saver.copy(tensors(6), progress(6))  # a save that waits is not given up for a copy
    for _ in range(2):
        held.let_go.release()
    saver.close()
    assert memory.newest()[1].step == 5
    assert values(held) == {2: [2.0], 5: [5.0]}


def test_without_a_memory_copies_are_nothing(storage):
    saver = BackgroundSaver(Checkpoints(storage, keep=9))
    saver.copy(tensors(1), progress(1))
    saver.close()
    assert storage.names() == []


def test_a_memory_that_takes_nothing_is_said_once(storage, tmp_path):
    said = []
    saver = BackgroundSaver(Checkpoints(storage, keep=9), Memory("a", tmp_path / "none"), said.append)
    for step in (1, 2):
        saver.copy(tensors(step), progress(step))
        saver.wait()
    saver.save(tensors(3), progress(3), lambda _: None)
    saver.close()
    assert len(said) == 1
    assert said[0].startswith("train.memory_seconds: no copy of the state is kept")
    assert values(storage) == {3: [3.0]}


def test_a_save_that_fails_is_not_silent(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder is needed")
    storage = Storage(str(tmp_path / "run"))
    saver = BackgroundSaver(Checkpoints(storage, keep=2))
    saver.save(tensors(1), progress(1), print)
    with pytest.raises(ClusterError, match="cannot be written"):
        saver.wait()
    saver.save(tensors(2), progress(2), print)
    with pytest.raises(ClusterError, match="cannot be written"):
        saver.close()


def test_a_later_save_hears_of_the_failure_before_it(storage):
    def then(_):
        raise ClusterError("nobody listens")

    def save_on():
        while True:  # one of the next ones hears it, once the thread has failed
            saver.save(tensors(1), progress(1), then)

    saver = BackgroundSaver(Checkpoints(storage, keep=2))
    with pytest.raises(ClusterError, match="nobody listens"):
        save_on()
    with suppress(ClusterError):
        saver.close()
    assert values(storage) == {1: [1.0]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpus_state_is_copied_before_the_next_step_changes_it(storage):
    """The call returns before the copy is done; what the GPU is told after it comes after it."""
    state = {"model": {"w": torch.zeros(50_000_000, device="cuda")}, "momentum": {}}
    saver = BackgroundSaver(Checkpoints(storage, keep=9))
    for step in range(1, 4):
        state["model"]["w"] += 1
        saver.save(state, progress(step), lambda _: None)
        state["model"]["w"] += 100
        state["model"]["w"] -= 100
        saver.wait()
    saver.close()
    assert values(storage) == {1: [1.0], 2: [2.0], 3: [3.0]}
