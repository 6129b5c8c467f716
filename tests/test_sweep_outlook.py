"""What a dry run says of a sweep, and how long it will take: arithmetic over given speeds."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import settings as flags
from orchestrator.plan import OFFICIAL
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.outlook import (
    OVERHEAD_S,
    SHOWN,
    Planned,
    Probe,
    Speed,
    describe,
    estimate,
    least_epochs,
    makespan,
    planned,
    rungs,
    work_of,
    works,
)
from orchestrator.sweep.settings import load
from pipelines.errors import ConfigError

EDGE = flags.Edge(Path("/home/of/skiplane"), cwd=Path("/here"))
WHERE = "this machine's CPU, 1 thread"


def sweep_of(line: str):
    argv = ["--recipe", "digits", "--name", "s1", *line.split()]
    base, sweep, space = load(argv, flags.parser("", ""), EDGE)[1:]
    return base, sweep, space, planned(base, sweep, space, OFFICIAL["digits"])


def probe(trials: list[Planned], step: float = 0.01, image: float = 0.001) -> Probe:
    """A lane takes `step` seconds, whatever the net."""
    return Probe({work: Speed(step * work.lanes, image) for work in works(trials)}, WHERE)


def said(line: str) -> str:
    base, sweep, space, trials = sweep_of(line)
    return describe(base, sweep, space, trials, probe(trials))


# -- rungs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "epochs", "marks"),
    [
        ({}, 6, [1, 3]),
        ({}, 3, [1]),  # the end is no rung
        ({}, 1, []),
        ({}, 90, [1, 3, 9, 27, 81]),
        ({"grace": 4, "factor": 2}, 33, [4, 8, 16, 32]),
        ({"grace": 4}, 4, []),
        ({"factor": 1.5}, 3, [1, 1.5, 2.25]),
        ({"stop": "median"}, 90, []),
        ({"stop": "none"}, 90, []),
    ],
)
def test_rungs_in_epochs(settings, epochs, marks) -> None:
    assert rungs(SweepConfig(**settings), epochs) == marks


@pytest.mark.parametrize(
    ("settings", "epochs", "mean"),
    [
        ({"stop": "none"}, 9, 9),
        ({}, 1, 1),
        ({}, 3, 1 + 2 / 3),  # one in three goes on behind the first epoch
        ({}, 9, 1 + 2 / 3 + 6 / 9),
        ({"grace": 2, "factor": 2}, 8, 2 + 2 / 2 + 4 / 4),
        ({"stop": "median"}, 9, 1 + 8 / 2),
        ({"stop": "median", "grace": 9}, 4, 4),
        ({"search": "pbt"}, 9, 9),
    ],
)
def test_epochs_of_a_trial_in_the_mean(settings, epochs, mean) -> None:
    assert least_epochs(SweepConfig(**settings), epochs) == pytest.approx(mean)


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("durations", "slots", "end"),
    [
        ([3, 3, 3], 1, 9),
        ([3, 3, 3], 2, 6),
        ([3, 3, 3], 9, 3),
        ([5, 1, 1, 1], 2, 5),
        ([1, 1, 1, 5], 2, 6),  # the longest begins last
    ],
)
def test_trials_take_the_slot_that_is_free_first(durations, slots, end) -> None:
    assert makespan(durations, slots) == end


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_a_makespan_is_between_its_bounds(durations: list[float], slots: int) -> None:
    end = makespan(durations, slots)
    assert max(max(durations), sum(durations) / slots) <= end * (1 + 1e-9)
    assert end <= sum(durations) * (1 + 1e-9)


def test_a_trials_time_is_steps_evaluations_and_a_constant() -> None:
    # digits: 22 steps an epoch of 4 lanes, 360 validation images; 6 epochs.
    _, sweep, _, trials = sweep_of("--sweep.depth 18,34 --sweep.stop none")
    one = 6 * (22 * 4 * 0.01 + 360 * 0.001) + OVERHEAD_S
    assert estimate(trials, probe(trials), 1, sweep) == pytest.approx((2 * one, 2 * one))
    assert estimate(trials, probe(trials), 2, sweep) == pytest.approx((one, one))


def test_more_workers_share_lanes_and_evaluation() -> None:
    # 4 lanes over 3 workers: the fullest plays 2, as with 2 workers; evaluation is shared by all.
    _, sweep, _, trials = sweep_of("--sweep.depth 18 --sweep.stop none --cluster.workers 1..3")
    least, most = (6 * (22 * lanes * 0.01 + 360 * 0.001 / n) + OVERHEAD_S for lanes, n in ((2, 3), (4, 1)))
    assert estimate(trials, probe(trials), 1, sweep) == pytest.approx((least, most))


def test_a_rare_evaluation_costs_less() -> None:
    _, sweep, _, trials = sweep_of("--sweep.depth 18 --sweep.stop none --train.eval_epochs 3")
    each = 6 * (22 * 4 * 0.01 + 360 * 0.001 / 3) + OVERHEAD_S
    assert estimate(trials, probe(trials), 1, sweep) == pytest.approx((each, each))


def test_asha_saves_between_all_that_it_may_and_nothing() -> None:
    _, sweep, _, trials = sweep_of("--sweep.lr 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9")
    epoch = 22 * 4 * 0.01 + 360 * 0.001
    least, most = estimate(trials, probe(trials), 1, sweep)
    assert most == pytest.approx(9 * (6 * epoch + OVERHEAD_S))
    assert least == pytest.approx(9 * ((1 + 2 / 3 + 3 / 9) * epoch + OVERHEAD_S))
    # With a slot for each trial, one still has to train to the end.
    least, most = estimate(trials, probe(trials), 9, sweep)
    assert least == most == pytest.approx(6 * epoch + OVERHEAD_S)


def test_work_is_what_a_step_depends_on() -> None:
    line = "--sweep.depth 18,34 --sweep.lr 0.1,0.2,0.3 --sweep.train.global_batch 32,64 --cluster.workers 1..2"
    _, _, _, trials = sweep_of(line)
    found = works(trials)
    assert len(trials) == 12
    assert {(w.arch.depth, w.micro_batch, w.lanes) for w in found} == {
        (depth, batch, lanes) for depth in (18, 34) for batch in (8, 16) for lanes in (4, 2)
    }
    assert len(found) == 8  # the rate costs nothing
    assert work_of(*trials[0], 3).lanes == 2


# -- words -------------------------------------------------------------------------------------------------------------


def test_a_grid_shows_all_its_trials() -> None:
    text = said("--sweep.depth 18,34 --sweep.model.shortcut none,A --sweep.lr 0.01:1.0:log:3")
    assert text.splitlines()[:5] == [
        "sweep      s1: 12 trials, search grid, judged by val/top1",
        "space      model.depth 18,34",
        "           model.shortcut none,A",
        "           optim.lr 0.01,0.1,1.0",
        "stopping   asha: one in 3 goes on after 1, 3 epochs (1,408, 4,224 images)",
    ]
    assert "trials     t001  plain-18 lr=0.01, 6 epochs = 132 steps, workers 1" in text
    assert "           t012  resnet-34 lr=1.0, 6 epochs = 132 steps, workers 1" in text
    assert "more" not in text
    # 20 s, 12 x 2 s, and trials of 6 x (22 x 4 x 0.01 + 360 x 0.001) s; a third beyond one epoch, a ninth to the end
    assert "time       1:14 to 2:13 for all, one after the other (sweep.concurrent is not set: at" in text
    assert (
        f"as measured on {WHERE}; decoding and sums over workers are left out; 20 s are added, and 2 s a trial" in text
    )
    assert "less: if the rule stops all that it may" in text


def test_of_many_trials_the_first_are_shown() -> None:
    text = said("--sweep.lr 0.01:1.0:log --sweep.trials 50")
    assert f"t{SHOWN:03d}" in text
    assert f"t{SHOWN + 1:03d}" not in text
    assert "... and 10 more" in text


def test_tpe_shows_how_it_goes_on() -> None:
    line = "--sweep.lr 0.01:1.0:log --sweep.depth 18,34 --sweep.workers 18=1,34=2 --sweep.search tpe --sweep.trials 8"
    text = said(line)
    assert "t001" not in text
    assert "trials     8, some at random, then each where those before it did well; workers 18=1, 34=2" in text
    assert "the nets that will be tried are not known: as many random ones are counted" in text


def test_pbt_says_what_it_changes() -> None:
    text = said("--sweep.lr 0.01:1.0:log --sweep.search pbt --sweep.trials 4 --sweep.interval 2 --sweep.concurrent 4")
    assert "stopping   none: poor trials take up good ones" in text
    assert "after every 2 epochs poor ones take up a good one and change optim.lr" in text
    assert "for all, 4 at once" in text
    assert "less:" not in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--sweep.stop none", "stopping   none"),
        ("--sweep.stop median --sweep.grace 2", "stopping   median: after 2 epochs a trial ends that is below the"),
        ("--sweep.stop median", "stopping   median: after 1 epoch a trial ends"),
        ("--sweep.grace 6", "stopping   none: no rung from sweep.grace = 6 below 6 epochs"),
        ("--train.epochs 100000", " days for all, one after the other"),
    ],
)  # fmt: skip
def test_what_stops_a_trial(line, words) -> None:
    assert words in said(f"--sweep.depth 18,34 {line}")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--sweep.train.global_batch 64,4096", "trial resnet-18 global_batch=4096: train.global_batch = 4096, data"),
        ("--sweep.optim.warmup_epochs 0,2", "trial resnet-18 warmup_epochs=2.0: optim.schedule is one_cycle: "),
    ],
)  # fmt: skip
def test_a_trial_that_does_not_fit_the_data_is_refused(line, sentence) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep_of(line)
    assert sentence in str(caught.value)


def test_refusals_wait_for_no_vendor() -> None:
    code = (
        "import sys; from orchestrator.sweep import outlook, settings; "
        "heavy = {'torch', 'ray', 'mlflow', 'nvidia', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
