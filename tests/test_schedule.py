"""Schedules, against torch's own, and as the recipes use them."""

import doctest
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from orchestrator.training import schedule


def torchs(make, steps, lr):
    """The learning rates that a torch scheduler gives to `steps` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(function, steps):
    return [function(step) for step in range(steps)]


def test_the_tables():
    assert doctest.testmod(schedule).failed == 0


def test_step():
    theirs = torchs(lambda o: lr_scheduler.MultiStepLR(o, [3, 7], 0.1), 10, 0.4)
    assert ours(schedule.step(0.4, 10, [3, 7]), 10) == pytest.approx(theirs)


def test_cosine():
    theirs = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, 12, 0.01), 12, 0.4)
    assert ours(schedule.cosine(0.4, 12, 0.01), 12) == pytest.approx(theirs)


def test_linear():
    theirs = torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, 12), 12, 0.4)
    assert ours(schedule.linear(0.4, 12, 0.1), 12) == pytest.approx(theirs)


@pytest.mark.parametrize("total", [2, 3, 4, 10, 11, 132])  # below four steps the peak lies before step 0
def test_one_cycle(total):
    theirs = torchs(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=total), total - 1, 0.1)
    assert ours(schedule.one_cycle(0.1, total), total - 1) == pytest.approx(theirs)
    assert schedule.one_cycle(0.1, total)(total - 1) == pytest.approx(0.1 / 25 / 1e4)


def test_one_cycle_of_one_step():
    assert schedule.one_cycle(0.1, 1)(0) == pytest.approx(0.1 / 25 / 1e4)


def test_warmup_then_cosine():
    """torchvision's form: LinearLR, then a cosine over what is left."""

    def theirs(optimizer):
        parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(optimizer, 15)]
        return lr_scheduler.SequentialLR(optimizer, parts, [5])

    built = schedule.build("cosine", 0.4, 20, warmup_steps=5, warmup_from=0.04)
    assert ours(built, 20) == pytest.approx(torchs(theirs, 20, 0.4))


def test_milestones_count_from_the_start_of_the_run():
    """Goyal et al.: batch 8192, five epochs of warm-up to 3.2, a tenth at epochs 30, 60 and 80, here 10 steps each."""
    goyal = schedule.build("step", 3.2, 900, warmup_steps=50, warmup_from=0.1, milestones=[300, 600, 800])
    expected = {0: 0.1, 25: 1.65, 50: 3.2, 299: 3.2, 300: 0.32, 599: 0.32, 600: 0.032, 800: 0.0032, 899: 0.0032}
    assert {step: goyal(step) for step in expected} == pytest.approx(expected)


@given(st.integers(1, 300), st.floats(1e-4, 10))
def test_one_cycle_rises_to_its_peak_and_falls(total, peak):
    rates = ours(schedule.one_cycle(peak, total), total)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) <= peak * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["constant", "step", "cosine", "linear", "one_cycle"])
@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(kind, step):
    with pytest.raises(ValueError, match=f"step is {step}; the schedule has steps 0 to 9"):
        schedule.build(kind, 0.1, 10)(step)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "plateau"}, "schedule is 'plateau'; allowed: constant, step, cosine, linear, one_cycle"),
        ({"kind": "cosine", "warmup_steps": 10}, "warm-up lasts 10 of 10 steps"),
        ({"kind": "one_cycle", "warmup_steps": 2}, "one_cycle warms up by itself: set the warm-up to 0"),
        (
            {"kind": "step", "warmup_steps": 4, "milestones": [3]},
            "the first milestone, step 3, lies inside the warm-up",
        ),
        ({"kind": "step", "milestones": [5, 5]}, "milestones are [5, 5]; they must rise"),
    ],
)
def test_what_does_not_fit_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        schedule.build(lr=0.1, total=10, **settings)
