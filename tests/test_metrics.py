"""Sums of an epoch, also across a checkpoint."""

import json
import math

import pytest

from orchestrator.training.metrics import EpochSums

STEPS = [
    {"loss": 2.5, "top1": 1.0, "top5": 3.0, "samples": 8.0, "grad_norm": 1.0, "request": 0.0},
    {"loss": 0.1, "top1": 5.0, "top5": 8.0, "samples": 8.0, "grad_norm": 0.3, "request": 1.0},
    {"loss": 1 / 3, "top1": 6.0, "top5": 7.0, "samples": 8.0, "grad_norm": 0.2, "request": 0.0},
]


def summed(steps, sums=None):
    sums = sums or EpochSums()
    for step in steps:
        sums.add(**step)
    return sums


def test_shares_and_mean():
    sums = summed(STEPS)
    assert sums.mean_loss == pytest.approx((2.5 + 0.1 + 1 / 3) / 3)
    assert (sums.steps, sums.samples, sums.top1_share, sums.top5_share) == (3, 24, 12 / 24, 18 / 24)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_checkpoint_in_mid_epoch_changes_no_bit(cut):
    saved = json.loads(json.dumps(summed(STEPS[:cut]).to_dict()))
    assert summed(STEPS[cut:], EpochSums.from_dict(saved)) == summed(STEPS)


def test_before_the_first_step_there_is_no_number():
    sums = EpochSums()
    assert all(math.isnan(value) for value in (sums.mean_loss, sums.top1_share, sums.top5_share))


def test_other_sums_are_refused():
    with pytest.raises(TypeError):
        EpochSums.from_dict({"loss": 1.0, "accuracy": 3})
