"""Places, Pareto fronts and the time left, on tables of small numbers; the winner's recipe, loaded again."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import settings
from orchestrator.config import RunConfig, flatten, identity_difference, kinds
from orchestrator.sweep.ranking import (
    best,
    best_of_nets,
    multiply_adds,
    pareto,
    placed,
    ranked,
    seconds,
    time_left,
)
from orchestrator.sweep.recipe import recipe
from orchestrator.sweep.trial import Fork, Trial
from tests.ended import trial, twelve

TOP1, LOSS = "val/top1", "val/loss"


def ids(trials: list[Trial]) -> list[str]:
    return [t.id for t in trials]


# -- places ------------------------------------------------------------------------------------------------------------


def test_more_accuracy_and_less_loss_are_better() -> None:
    trials = [trial(1, top1=0.5), trial(2, top1=0.9), trial(3, top1=0.7)]
    assert ids(ranked(trials, TOP1)) == ids(ranked(trials, LOSS)) == ["t002", "t003", "t001"]


def test_ties_go_to_the_cheaper_net_and_then_to_the_earlier_trial() -> None:
    trials = [trial(1, "resnet-34", 0.9), trial(3, "resnet-18", 0.9), trial(2, "resnet-18", 0.9)]
    assert ids(ranked(trials, TOP1)) == ["t002", "t003", "t001"]


def test_unknown_and_not_a_number_come_last() -> None:
    nan = trial(3, top1=float("nan"))
    trials = [trial(1), nan, trial(2, top1=0.1), trial(4, top1=0.0)]
    assert ids(ranked(trials, TOP1)) == ["t002", "t004", "t001", "t003"]
    assert best([trial(1), nan], TOP1) is None
    assert best([], TOP1) is None


def test_a_stopped_trial_never_beats_one_that_ran_to_its_end() -> None:
    trials = [trial(1, top1=0.9, state="stopped"), trial(2, top1=0.2), trial(3, top1=0.95, state="running")]
    assert ids(ranked(trials, TOP1)) == ["t003", "t001", "t002"]
    assert ids(placed(trials, TOP1)) == ["t002", "t003", "t001"]
    assert best(trials, TOP1) == trials[1]
    assert best([trials[0], trials[2]], TOP1) == trials[2]  # none has finished


def test_a_part_that_another_trial_took_up_did_not_run_to_the_end() -> None:
    """As in population based training: the part ended by plan, and its score is that of a third of the schedule."""
    part, whole = trial(1, top1=0.9, epoch=2, stop_after=2), trial(2, top1=0.8, fork=Fork("t001", 2))
    assert ids(placed([part, whole], TOP1)) == ["t002", "t001"]
    assert best([part], TOP1) == part


def test_best_of_each_net() -> None:
    assert ids(best_of_nets(twelve(), TOP1)) == ["t011", "t008", "t002", "t005"]
    assert best_of_nets([trial(1)], TOP1) == []


# -- Pareto ------------------------------------------------------------------------------------------------------------


def test_front_over_cost_and_score() -> None:
    assert ids(pareto(twelve(), TOP1, multiply_adds)) == ["t008", "t011"]
    slow = [trial(1, top1=0.9, seconds=10.0), trial(2, top1=0.8, seconds=20.0), trial(3, top1=0.95, seconds=30.0)]
    assert ids(pareto(slow, TOP1, seconds)) == ["t001", "t003"]


def test_front_leaves_out_what_was_stopped_unless_nothing_finished() -> None:
    stopped = trial(1, top1=0.3, state="stopped", seconds=1.0)
    assert ids(pareto([stopped, trial(2, top1=0.9)], TOP1, seconds)) == ["t002"]
    assert ids(pareto([stopped], TOP1, seconds)) == ["t001"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.randoms())
def test_front_is_what_no_other_trial_beats(points: list[tuple[int, int]], random) -> None:
    """Against the definition, for every trial; and the order that trials came in does not matter."""
    trials = [trial(i, top1=score / 10, seconds=float(cost)) for i, (cost, score) in enumerate(points)]
    front = pareto(trials, TOP1, seconds)
    for one, (cost, score) in zip(trials, points, strict=True):
        beaten = any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
        equals = [t for t, point in zip(trials, points, strict=True) if point == (cost, score)]
        assert (one in front) is (not beaten and one == equals[0])
    random.shuffle(trials)
    assert pareto(trials, TOP1, seconds) == front


# -- time left ---------------------------------------------------------------------------------------------------------


def running(number: int, epoch: int, net: str = "resnet-18", a_epoch: float = 2.0) -> Trial:
    return trial(number, net, 0.5, state="running", epoch=epoch, seconds=a_epoch * epoch)


@pytest.mark.parametrize(
    ("trials", "total", "concurrent", "left"),
    [
        ([], 12, 2, None),
        ([trial(1), trial(2)], 12, 2, None),  # nothing tells how fast an epoch is
        ([trial(1, state="failed", seconds=3.0)], 12, 2, None),  # nor does a failure
        ([trial(1, top1=0.9)], 1, 2, 0.0),
        ([trial(1, top1=0.9), trial(2)], 2, 1, 12.0),  # six epochs at 2 s
        ([trial(1, top1=0.9), trial(2), trial(3)], 3, 2, 12.0),  # two at a time
        ([trial(1, top1=0.9), trial(2)], 2, 8, 12.0),  # one trial is not divided over the free places
        ([trial(1, top1=0.9)], 4, 1, 36.0),  # three are not drawn yet
        ([trial(1, top1=0.9), running(2, 4)], 2, 1, 4.0),  # two epochs left
        ([running(1, 2)], 1, 1, 8.0),  # nothing ended: its own reports tell
        ([trial(1, top1=0.9), trial(2, top1=0.1, state="stopped", epoch=2, seconds=4.0), trial(3)], 3, 1, 8.0),  # 16 s
        # for 12 planned epochs: as many as so far are expected to be stopped
        ([trial(1, top1=0.9), trial(2, "resnet-34", 0.9, seconds=30.0), trial(3, "resnet-34")], 3, 1, 30.0),  # by net
        ([trial(1, top1=0.9), trial(3, "resnet-34")], 2, 1, 12.0),  # of that net nothing is known: as the others
        ([trial(1, top1=0.9), trial(2, stop_after=4, fork=Fork("t001", 2))], 2, 1, 4.0),  # epochs 3 and 4
        ([running(1, 2, a_epoch=3.0), replace(running(2, 4), fork=Fork("t001", 2))], 2, 1, 21.0),  # 4 and 2 epochs, at
        # (6 + 8) s for the (2 + 2) that they did
        ([replace(running(1, 2), state="waiting")], 1, 1, 8.0),  # between two parts
    ],
)
def test_time_left(trials: list[Trial], total: int, concurrent: int, left: float | None) -> None:
    assert time_left(trials, total, concurrent) == (left if left is None else pytest.approx(left))


# -- the recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings.recipe_names())
def test_recipe_gives_the_same_weights_wherever_it_is_trained(name: str, tmp_path: Path) -> None:
    edge = settings.Edge(tmp_path)
    flags = ["--recipe", name, "--cluster.workers", "1..2", "--tracking.log_steps", "7", "--train.eval_epochs", "1"]
    base = settings.load(flags, settings.parser("", ""), edge)[1]
    varied = {"model.shortcut": "C", "optim.lr": 0.012345678901234567, "optim.weight_decay": 1e-5,
              "optim.warmup_epochs": 0.5, "model.version": "v1.5", "train.epochs": base.train.epochs + 1}  # fmt: skip
    (tmp_path / "best.yaml").write_text(recipe(base, varied, "the best of s1"))
    again = settings.load(["--config", f"{tmp_path}/best.yaml"], settings.parser("", ""), edge)[1]
    won = base.replace(varied)
    assert identity_difference(flatten(won), again) == []
    assert again.train.epochs == won.train.epochs
    assert {n for n in flatten(again) if flatten(again)[n] != flatten(won)[n]} <= {
        "cluster.workers", "tracking.log_steps", "tracking.progress_seconds", "train.channels_last"}  # fmt: skip


def test_recipe_is_short_and_in_sections() -> None:
    base = RunConfig().replace({"model.depth": 34, "cluster.workers": "4", "tracking.uri": "off", "name": "s1"})
    text = recipe(base, {"optim.lr": 0.1, "model.shortcut": "none"}, "the best of s1:\n98.3 %")
    assert text == (
        "# the best of s1:\n# 98.3 %\nmodel: {depth: 34, shortcut: none}\noptim: {lr: 0.1}\n"  # the default, and found
    )


def test_recipe_has_what_fixes_the_weights_and_nothing_else() -> None:
    for name, kind in kinds().items():
        text = recipe(RunConfig(), {name: flatten(RunConfig())[name]})
        assert bool(text) is (kind == "identity" or name == "train.epochs")
