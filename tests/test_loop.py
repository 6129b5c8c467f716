"""The loop: steps in order, numbers passed on, requests heard by all at the same step."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from orchestrator.training.loop import LAG, Delayed, train
from orchestrator.training.schedule import linear
from pipelines.errors import TrainingError
from tests.ranks import on_ranks
from tests.small import batch, make_step, run, sha256, share

LANES, STEPS_PER_EPOCH = 2, 3


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    epoch: int
    step: int
    digest: int = 0
    bad: tuple = ()


def batches(start, stop, lanes=LANES, rows=slice(None)):
    for number in range(start, stop):
        images, labels = batch(number, lanes)
        yield Batch(images[rows], labels[rows], *divmod(number, STEPS_PER_EPOCH), digest=100 + number, bad=(number,))


def driven(step, start, stop, source=None, **settings):
    settings = {"steps_per_epoch": STEPS_PER_EPOCH, "start": start, "stop": stop} | settings
    return train(step, source or batches(start, stop), linear(0.1, 10), **settings)


def drive(*args, **settings):
    return list(driven(*args, **settings))


def test_steps_carry_their_position_and_their_batch():
    done = drive(make_step(LANES), 2, 7)  # across two epochs' ends
    assert [d.global_step for d in done] == [2, 3, 4, 5, 6]
    assert [(d.epoch, d.step) for d in done] == [(0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [d.lr for d in done] == pytest.approx([0.08, 0.07, 0.06, 0.05, 0.04])
    assert [d.digest for d in done] == [102, 103, 104, 105, 106]
    assert [d.bad for d in done] == [(2,), (3,), (4,), (5,), (6,)]
    assert all(d.wait_s >= 0 and d.step_s > 0 for d in done)


def test_the_loop_trains_as_the_step_does():
    looped, stepped = make_step(LANES), make_step(LANES)
    for d in driven(looped, 0, 4):
        run(stepped, d.global_step, d.global_step + 1, LANES, lr=d.lr)
        assert sha256(looped.model) == sha256(stepped.model)  # at the yield the net is that after this step


def test_a_request_is_heard_lag_steps_later():
    asks = iter([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    done = drive(make_step(LANES), 0, 6, request=lambda: next(asks))
    assert LAG == 2
    assert [d.asked for d in done] == [0, 0, 0, 1, 0, 0]  # the last one ends with the run


def heard(rank, world_size):
    """Steps at which a rank hears the request that rank 1 makes once, in step 1."""
    rows = share(rank, world_size, 3)
    step = make_step(1, total_lanes=3, world_size=world_size)
    asks = iter([0.0, float(rank == 1), 0.0, 0.0, 0.0])
    source = batches(0, 5, lanes=3, rows=rows)
    return [d.global_step for d in drive(step, 0, 5, source, request=lambda: next(asks)) if d.asked]


@pytest.mark.slow
def test_one_rank_asks_and_all_hear_it_at_the_same_step():
    assert on_ranks(3, heard) == [[3], [3], [3]]


def test_values_come_back_in_order_after_the_lag():
    delayed = Delayed(2)
    assert [delayed.swap(torch.tensor(float(i))) for i in range(1, 6)] == [0, 0, 1, 2, 3]


def test_colour_is_asked_for_each_batch():
    seen = []

    def colour(given):
        seen.append((given.epoch, given.step))
        return torch.full((len(given.images), 3), 0.5)

    tinted, plain = drive(make_step(LANES), 0, 1, colour=colour), drive(make_step(LANES), 0, 1)
    assert seen == [(0, 0)]
    assert tinted[0].stats.loss != plain[0].stats.loss


def test_data_that_ends_early_is_an_error():
    with pytest.raises(TrainingError, match="the data ended before epoch 1, step 1"):
        drive(make_step(LANES), 0, 6, source=batches(0, 4))


def test_data_of_another_position_is_an_error():
    with pytest.raises(TrainingError, match="the data is at epoch 0, step 2; training is at 0, 1"):
        drive(make_step(LANES), 1, 3, source=batches(2, 4))
