"""Any number of workers: the same samples, pixels and evaluation; with exact sums the same weights too."""

import uuid

import pytest

from orchestrator.state.memory import Memory
from tests.gloo_group import GlooGroup, train

pytestmark = pytest.mark.slow
LANES = ("--data.lanes", "8", "--model.width", "4", "--train.epochs", "2")
EXACT = (*LANES, "--train.reduce", "exact")
SAME_DATA = ("data_digest", "bad_samples", "steps")


@pytest.fixture(scope="module")
def alone(settings_in):
    """An undisturbed run of one process."""
    return train(settings_in("alone", *EXACT), 1)[0]


@pytest.fixture(scope="module")
def settings_in(home, tmp_path_factory):
    from orchestrator import settings

    storage = tmp_path_factory.mktemp("runs")

    def make(name, *flags):
        line = ["--recipe", "digits-quick", "--cluster.storage", str(storage), "--tracking.uri", "off", "--name", name]
        return settings.load([*line, *flags], settings.parser("", ""), settings.Edge(home))[1]

    return make


def test_sums_in_another_order_change_the_weights_but_not_what_is_read_and_scored(settings_in, alone):
    """With `fast` the weights differ in their last bits; the data, their order and the evaluation's do not."""
    for summary in train(settings_in("fast", *LANES), 3):
        assert summary["curve"][-1]["eval_digest"] == alone["curve"][-1]["eval_digest"]
        for key in SAME_DATA:
            assert summary[key] == alone[key], key


@pytest.mark.parametrize("world", [2, 3, 4])
def test_exact_sums_give_the_same_weights_at_any_number_of_processes(settings_in, alone, world):
    for summary in train(settings_in(f"exact-{world}", *EXACT), world):
        for key in ("weights_sha256", "curve", "train_loss_mean", *SAME_DATA):
            assert summary[key] == alone[key], key


def killed_at(group, step):
    """Kills a rank once so many steps are done, or a few more."""
    reached = (r["global_step"] for r in group.records() if r["kind"] == "progress")
    assert next(at for at in reached if at >= step)
    group.kill(group.world - 1)


def test_three_processes_then_two_then_four(settings_in, alone):
    """One dies in mid-epoch, two go on, one of those dies, four go on: the weights of one that was never disturbed."""
    config = settings_in("changing", *EXACT, "--train.checkpoint_steps", "4", "--tracking.log_steps", "1")
    for world, step in ((3, 7), (2, 15)):
        with GlooGroup(config, world) as group:
            killed_at(group, step)
    for summary in train(config, 4):
        for key in ("weights_sha256", "curve", "train_loss_mean", *SAME_DATA):
            assert summary[key] == alone[key], key


def test_a_copy_in_memory_that_is_newer_than_the_checkpoint_is_gone_on_from(settings_in, alone):
    """No checkpoint in storage at all: the epoch is begun anew from what memory holds."""
    run_id = uuid.uuid4().hex
    config = settings_in("remembered", *EXACT, "--train.memory_seconds", "0.01", "--tracking.log_steps", "1")
    with GlooGroup(config, 3, run_id) as group:
        killed_at(group, 9)
    (*_, step), _ = Memory(run_id).newest()
    assert 1 <= step < 44
    with GlooGroup(config, 2, run_id) as group:
        *records, end = group.records()
    [restored] = [r for r in records if r["kind"] == "restored"]
    assert (restored["global_step"], restored["source"]) == (step, "from memory")
    for key in ("weights_sha256", "curve", "train_loss_mean", *SAME_DATA):
        assert end[key] == alone[key], key
    assert Memory(run_id).newest() is None  # a run that is finished leaves nothing there
