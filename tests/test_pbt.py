"""Population based training: who goes on from whom, with what."""

from dataclasses import replace
from math import inf, isfinite, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import RunConfig
from orchestrator.sweep.config import SweepConfig, settled
from orchestrator.sweep.pbt import ANEW, Member, Pbt, generations, lineage, next_generation, stop_after
from orchestrator.sweep.runs import check
from orchestrator.sweep.search import open_search
from orchestrator.sweep.space import Range, Space, Values, draws
from orchestrator.sweep.trial import Fork, Report, Trial
from pipelines.errors import ConfigError

LOW, HIGH = 0.01, 1.0
SPACE = Space({"model.depth": Values((18, 34)), "optim.lr": Range(LOW, HIGH, log=True)})


def population(scores, seed=0, space=SPACE):
    points = draws(space, seed, len(scores))
    return [Member(f"t{i:03d}", points[i], score) for i, score in enumerate(scores)]


def born(scores, generation=1, interval=2, epochs=9, seed=0):
    return next_generation(population(scores, seed), generation, interval, epochs, SPACE, seed)


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "interval", "count", "ends"),
    [
        (9, 2, 5, [2, 4, 6, 8, 0]),  # the last one is shorter
        (8, 2, 4, [2, 4, 6, 0]),
        (2, 3, 1, [0]),
        (3, 1, 3, [1, 2, 0]),
    ],
)
def test_generations_cover_the_epochs(epochs, interval, count, ends):
    assert generations(epochs, interval) == count
    assert [stop_after(generation, interval, epochs) for generation in range(count)] == ends


@pytest.mark.parametrize(
    ("scores", "replaced", "donors"),
    [
        ([0.5], [], []),  # nobody to learn from
        ([0.1, 0.5], [0], [1]),
        ([0.5, 0.1, 0.3], [1], [0]),
        ([0.5, 0.5], [1], [0]),  # of equal ones the first is the better one
        ([8, 7, 6, 5, 4, 3, 2, 1], [6, 7], [0, 1]),
        ([8, None, 6, nan, 4, -inf, 2, inf], [1, 3, 5, 7], [0, 2]),  # four failed: more than a quarter
        ([None, None, None, 0.1], [0, 1, 2], [3]),
        ([None, 0.2, 0.1, 0.3], [0], [3]),  # the failed one is the worst quarter
    ],
)
def test_the_worst_quarter_goes_on_from_the_best(scores, replaced, donors):
    members, ids = population(scores), [f"t{i:03d}" for i in donors]
    seen = set()
    for seed in range(40):
        drawn = next_generation(members, 1, 2, 9, SPACE, seed)
        for i, (draw, member) in enumerate(zip(drawn, members, strict=True)):
            if i in replaced:
                seen.add(draw.fork.trial)
                assert draw.fork.trial in ids
                source = members[int(draw.fork.trial[1:])].point
                assert draw.point["model.depth"] == source["model.depth"]
                assert draw.point["optim.lr"] != source["optim.lr"]
            else:
                assert draw == type(draw)(member.point, Fork(member.trial, 2), 4)
    assert seen == (set(ids) if replaced else set())


@pytest.mark.parametrize("scores", [[None], [None, nan], [inf, -inf, None]])
def test_where_all_failed_nobody_follows(scores):
    assert born(scores) == []


def test_a_rate_moves_by_a_factor_or_is_drawn_anew():
    """Of four parts one is drawn anew; the others go up and down alike often."""
    members = [Member("a", {"model.depth": 18, "optim.lr": 0.1}, 1.0), Member("b", {}, 0.0)]
    rates = [next_generation(members, 1, 1, 9, SPACE, seed)[1].point["optim.lr"] for seed in range(400)]
    up, down = rates.count(0.12), rates.count(0.08)
    assert 0.75 * ANEW < (400 - up - down) / 400 < 1.25 * ANEW
    assert 0.8 < up / down < 1.25


@pytest.mark.parametrize(("rate", "moved"), [(HIGH, 0.8), (LOW, 0.012), (0.9, HIGH), (0.011, LOW)])
def test_a_rate_stays_in_its_range_and_moves_at_its_ends(rate, moved):
    members = [Member("a", {"model.depth": 18, "optim.lr": rate}, 1.0), Member("b", {}, 0.0)]
    rates = {next_generation(members, 1, 1, 9, SPACE, seed)[1].point["optim.lr"] for seed in range(60)}
    assert moved in rates
    assert rate not in rates


def test_a_value_of_zero_is_drawn_anew():
    space = Space({"optim.momentum": Range(0.0, 0.9)})
    members = [Member("a", {"optim.momentum": 0.0}, 1.0), Member("b", {}, 0.0)]
    assert all(next_generation(members, 1, 1, 9, space, seed)[1].point["optim.momentum"] for seed in range(20))


# -- properties --------------------------------------------------------------------------------------------------------

scores = st.lists(st.one_of(st.none(), st.floats(), st.integers(0, 5).map(float)), min_size=1, max_size=20)


@given(scores, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_generation_follows_from_the_one_before(heard, generation, interval, seed):
    members = population(heard, seed)
    drawn = next_generation(members, generation, interval, 99, SPACE, seed)
    assert drawn == next_generation(list(members), generation, interval, 99, SPACE, seed)
    alive = {m.trial: m for m in members if m.score is not None and isfinite(m.score)}
    if not alive:
        assert drawn == []
        return
    assert len(drawn) == len(members)
    assert {draw.fork.trial for draw in drawn} <= set(alive)
    assert {draw.fork.epoch for draw in drawn} == {generation * interval}
    for draw in drawn:
        rate = draw.point["optim.lr"]
        assert LOW <= rate <= HIGH
        assert rate == float(f"{rate:.4g}")
    best = max(alive.values(), key=lambda m: m.score)
    assert drawn[members.index(best)].fork.trial == best.trial
    assert drawn[members.index(best)].point == best.point


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_trials_of_unlike_lengths_are_refused():
    space = Space({"train.epochs": Values((4, 8)), **SPACE.dimensions})
    with pytest.raises(ConfigError, match=r"sweep.search is pbt, where trials .* take train.epochs out of the space"):
        settled(SweepConfig(search="pbt", trials=4), space)


def test_an_interval_at_whose_end_nothing_is_known_is_refused():
    base = RunConfig(name="s").replace({"train.eval_epochs": 2, "model.depth": 18})
    check(base, SweepConfig(search="pbt", trials=4, interval=4), SPACE)
    with pytest.raises(ConfigError, match=r"sweep.interval is 3, and train.eval_epochs = 2 does not divide it"):
        check(base, SweepConfig(search="pbt", trials=4, interval=3), SPACE)


# -- as a search -------------------------------------------------------------------------------------------------------


def told(trial, top1):
    report = Report(0, trial.stop_after or 5, 100, {"val/top1": top1})
    return replace(trial, state="finished", reports=(report,))


def trial_of(draw, number):
    return Trial(f"t{number:03d}", draw.point, "", epochs=5, fork=draw.fork, stop_after=draw.stop_after)


@pytest.fixture
def search():
    sweep = SweepConfig(search="pbt", trials=4, interval=2, seed=3)
    return open_search(SPACE, settled(sweep, SPACE), epochs=5)


def test_a_generation_waits_for_the_one_before(search):
    assert isinstance(search, Pbt)
    trials = []
    for number in range(4):
        trials.append(trial_of(search.next(trials), number))
    assert [(trial.fork, trial.stop_after) for trial in trials] == [(None, 2)] * 4
    assert [trial.config for trial in trials] == draws(SPACE, 3, 4)
    assert search.next(trials) is None
    ended = [told(trial, top1) for trial, top1 in zip(trials, (0.1, 0.9, 0.5, 0.6), strict=True)]
    assert search.next([*ended[:3], trials[3]]) is None
    for number in range(4, 8):
        ended.append(trial_of(search.next(ended), number))
    assert [trial.fork for trial in ended[4:]] == [Fork(f"t00{i}", 2) for i in (1, 1, 2, 3)]
    assert (search.total, {trial.stop_after for trial in ended[4:]}) == (12, {4})


def test_the_last_generation_goes_to_the_end(search):
    trials = []
    while len(trials) < search.total:
        trials.append(told(trial_of(search.next(trials), len(trials)), 0.1 * (len(trials) % 4)))
    assert [trial.stop_after for trial in trials] == [2] * 4 + [4] * 4 + [0] * 4


def test_a_trial_has_a_line_of_ancestors(search):
    trials = []
    while len(trials) < search.total:
        trials.append(told(trial_of(search.next(trials), len(trials)), (0.9, 0.1, 0.2, 0.3)[len(trials) % 4]))
    line = lineage(trials, "t009")  # in the place of the worst of the second generation: it goes on from the best
    assert [trial.id for trial in line] == ["t000", "t004", "t009"]
    assert [trial.fork for trial in line] == [None, Fork("t000", 2), Fork("t004", 4)]
    assert lineage(trials, "t002") == [trials[2]]


def test_a_search_whose_population_failed_has_no_more_trials(search):
    trials = [replace(trial_of(search.next([]), number), state="failed") for number in range(4)]
    assert (search.next(trials), search.total) == (None, 4)
