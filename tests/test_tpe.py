"""Optuna's TPE behind Tune's searcher: what it suggests follows from the trials that it is told, and it learns."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cluster.tpe import suggest
from orchestrator.sweep.space import By, Range, Space, Values, draws, grid, size
from pipelines.errors import ConfigError

RATE = Space({"optim.lr": Range(0.001, 10.0, log=True)})
NETS = Space(
    {
        "model.depth": Values((18, 34)),
        "model.shortcut": Values(("none", "A")),
        "optim.nesterov": Values((True, False)),
        "optim.lr": Range(0.01, 1.0, log=True),
        "train.epochs": Range(2, 9, whole=True),
        "train.global_batch": By("model.depth", ((18, Values((32, 64))), (34, Range(8, 24, whole=True)))),
    }
)


def far(point):
    """Decades from the best rate, 0.1."""
    return abs(math.log10(point["optim.lr"]) + 1)


def searched(space, score, trials, seed):
    """Points of a sweep of which one trial runs at a time."""
    known = []
    for number in range(trials):
        point = suggest(space, known, seed, number)
        known.append((point, score(point)))
    return [point for point, _ in known]


def fits(space, point):
    for name in space.dimensions:
        part, value = space.at(name, point), point[name]
        if isinstance(part, Values):
            assert value in part.values
        else:
            assert part.low <= value <= part.high
            assert value == part.inside(value)
            assert isinstance(value, int if part.whole else float)
    assert list(point) == list(space.dimensions)


KNOWN = [(point, score) for point, score in zip(
    draws(NETS, 5, 9), [0.2, 0.9, None, -math.inf, 0.5, math.nan, 0.7, 0.1, None], strict=True)]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_the_same_trials_and_seed_give_the_same_point(count):
    point = suggest(NETS, KNOWN[:count], 7, count)
    fits(NETS, point)
    assert suggest(NETS, list(KNOWN[:count]), 7, count) == point
    assert suggest(NETS, KNOWN[:count], 8, count) != point
    assert suggest(NETS, KNOWN[:count], 7, count + 1) != point


def test_another_process_suggests_the_same_and_says_nothing(capfd):
    """Whatever its hashes are; a warning would be an error."""
    code = (
        "import json; from tests.test_tpe import KNOWN, NETS, suggest;"
        "print(json.dumps([suggest(NETS, KNOWN[:n], 7, n) for n in (0, 9)]))"
    )
    line = [sys.executable, "-W", "error", "-c", code]
    env = {**os.environ, "PYTHONHASHSEED": "3"}
    done = subprocess.run(line, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [suggest(NETS, KNOWN[:n], 7, n) for n in (0, 9)]
    assert capfd.readouterr() == ("", "")


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.lists(st.one_of(st.none(), st.floats()), max_size=12))
def test_every_point_is_one_of_the_space_and_new(seed, scores):
    known = list(zip(draws(NETS, seed, len(scores)), scores, strict=True))
    point = suggest(NETS, known, seed, len(known))
    fits(NETS, point)
    assert point not in [other for other, _ in known]


def test_it_finds_the_best_rate_sooner_than_chance():
    """Decades from it of the last ten of 25 trials, over six seeds."""
    learned = [searched(RATE, lambda point: -far(point), 25, seed)[-10:] for seed in range(6)]
    drawn = [draws(RATE, seed, 25)[-10:] for seed in range(6)]
    near, chance = (sum(far(point) for last in points for point in last) / 60 for points in (learned, drawn))
    assert near < 0.7 * chance
    assert 0.8 < chance < 1.2  # four decades, three of them above


def test_what_diverges_is_learned_from():
    """Above 0.3 all fail: of the last ten of 25 few do."""

    def score(point):
        return -far(point) if point["optim.lr"] <= 0.3 else -math.inf

    failed = [sum(p["optim.lr"] > 0.3 for p in searched(RATE, score, 25, seed)[-10:]) for seed in range(6)]
    by_chance = [sum(p["optim.lr"] > 0.3 for p in draws(RATE, seed, 25)[-10:]) for seed in range(6)]
    assert sum(failed) < 0.6 * sum(by_chance)


def test_a_trial_that_runs_keeps_others_away():
    """Eight that are asked one after the other while none has ended spread more than eight that know nothing of it."""
    scored = [(point, -far(point)) for point in draws(RATE, 0, 12)]
    running = list(scored)
    for number in range(12, 20):
        running.append((suggest(RATE, running, 1, number), None))
    blind = [suggest(RATE, scored, 1, number) for number in range(12, 20)]

    def spread(points):
        places = sorted(math.log10(point["optim.lr"]) for point in points)
        return places[-2] - places[1]

    assert spread([point for point, _ in running[12:]]) > spread(blind)


def test_a_space_of_lists_is_tried_to_its_last_point_and_none_twice():
    lists = Space({"model.depth": Values((18, 34, 50)), "optim.momentum": Values((0.0, 0.9))})
    points = searched(lists, lambda point: point["model.depth"], size(lists), 0)
    assert sorted(map(str, points)) == sorted(map(str, grid(lists)))
    with pytest.raises(ConfigError, match="the space has no point that was not tried; 6 trials are all it has room"):
        suggest(lists, [(point, 1.0) for point in points], 0, 6)
