"""Stopping rules: Tune's own, against tables worked by hand and against the rule said a second time."""

from dataclasses import dataclass, field
from math import ceil, inf, isfinite, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.rules import WORST, Asha, Median
from orchestrator.sweep.rules import NoRule, replay
from orchestrator.sweep.trial import Report, Trial

TOP1 = "val/top1"


def told(rule, reports):
    return [rule.hear(*report) for report in reports]


# -- tables ------------------------------------------------------------------------------------------------------------

# Scores of one rung in their order, factor 3, and who stops. The bar is the 66.7th percentile of those before.
RUNG = [
    ([5], ""),  # the first goes on, whatever it is
    ([5, 5], "."),  # as good as the bar is good enough
    ([5, 4], "s"),
    ([5, 3, 4], "ss"),  # 3, 5: the bar is 3 + 2/3 * 2 = 4.33
    ([5, 3, 6], "s."),
    ([5, 3, 6, 4], "s.s"),  # 3, 5, 6: the bar lies a third of the way from 5 to 6
    ([1, 2, 3, 4, 5], "...."),  # rising: each is the best so far, and nobody stops
    ([5, 4, 3, 2, 1], "ssss"),
    ([1, 2, 3, 4, 3], "...."),  # 1, 2, 3, 4: the bar is 3
    ([1, 2, 3, 4, 2.9], "...s"),
]


@pytest.mark.parametrize(("scores", "stops"), RUNG)
def test_a_rung_worked_by_hand(scores, stops):
    answers = told(Asha(TOP1, grace=10, factor=3, end=90), [(f"t{i}", 10, s) for i, s in enumerate(scores)])
    assert "".join("s" if answer else "." for answer in answers[1:]) == stops
    assert answers[0] is None


def test_the_paper_on_small_numbers():
    """Nine trials, factor 3, rungs at 1, 3 and 9, as in Figure 1 of Li et al. 2020.

    There 9, 3 and 1 come to them, once all have come; here the order decides, too.
    """
    rule = Asha(TOP1, grace=1, factor=3, end=9)
    assert rule.rungs() == [1, 3]  # at 9 all have ended
    first = told(rule, [(f"t{s}", 1, s / 10) for s in (9, 8, 1, 2, 3, 4, 5, 6, 7)])
    # bars in tenths: -, 9, 8.67, 8.33, 8, 6.33, 5.33, 5, 5.67
    assert [bool(answer) for answer in first] == [False, True, True, True, True, True, True, False, False]
    second = told(rule, [("t6", 3, 0.6), ("t9", 3, 0.9), ("t7", 3, 0.7)])
    assert [bool(answer) for answer in second] == [False, False, True]  # bars: -, 6, 8
    assert told(rule, [("t6", 9, 0.0), ("t9", 9, 1.0)]) == [None, None]


def test_the_sentence_says_the_bar_and_of_how_many():
    rule = Asha(TOP1, grace=2816, factor=3, end=20_000)
    *_, answer = told(rule, [(f"t{i}", 2816, s) for i, s in enumerate([0.91, 0.2, 0.95, 0.93, 0.932, 0.712])])
    assert answer == ("asha: val/top1 71.20 % after 2,816 images is below 93.13 %, the best third of 5 trials there")
    rule = Asha("val/loss", grace=1, factor=2, end=9)
    assert told(rule, [("a", 1, -0.5), ("b", 1, -2.31)])[1] == (
        "asha: val/loss 2.31 after 1 images is above 0.5, the best half of 1 trial there"
    )
    rule = Median(TOP1, grace=1, least=2)
    assert told(rule, [("a", 5, 0.5), ("b", 5, 0.7), ("c", 5, 0.4)])[2] == (
        "median: val/top1 40.00 % at best after 5 images is below 60.00 %, the median of 2 trials' averages until there"
    )


def test_the_median_worked_by_hand():
    rule = Median(TOP1, grace=2, least=2)
    reports = [
        ("a", 1, 0.1, None), ("a", 2, 0.4, None), ("a", 3, 0.6, None),  # nobody to compare with
        ("b", 1, 0.0, None),  # grace
        ("b", 2, 0.1, None), ("b", 3, 0.2, None),  # one other is too few
        ("c", 2, 0.25, None),  # a: 0.4, b: 0.1: as good as the median
        ("c", 3, 0.2, "stops"),  # averages from 2 on: a 0.5, b 0.15; the median 0.325, its best 0.25
        ("d", 2, 0.4, None),  # a: 0.4, b: 0.1, c: 0.25, which counts though it has stopped
        ("d", 3, 0.0, None),  # its best is what counts
    ]  # fmt: skip
    assert [bool(rule.hear(*report[:3])) for report in reports] == [bool(report[3]) for report in reports]
    assert rule.rungs() == []


# -- ends, doubles, what is no number ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Asha(TOP1, 10, 3, 90), Median(TOP1, 10, least=1), NoRule()])
def test_who_has_reached_its_end_is_not_stopped_and_counts(rule):
    assert told(rule, [("a", 10, 0.9, True), ("b", 10, 0.1, True)]) == [None, None]
    if not isinstance(rule, NoRule):
        assert rule.hear("c", 10, 0.3)


def test_no_rule_stops_nobody():
    assert (NoRule().hear("a", 1, -inf), NoRule().rungs()) == (None, [])


@pytest.mark.parametrize("make", [lambda: Asha(TOP1, 10, 3, 90), lambda: Median(TOP1, 10, least=1)])
def test_a_trial_that_was_stopped_stays_so_until_its_end(make):
    rule = make()
    _, why = told(rule, [("a", 20, 0.9), ("b", 20, 0.1)])
    assert told(rule, [("b", 40, 0.95), ("b", 20, 0.1), ("b", 10, 0.0)]) == [why, why, None]
    assert told(rule, [("b", 80, 0.95, True), ("c", 20, 0.5)])[0] is None


def test_a_trial_counts_where_it_comes_to_a_rung_or_beyond():
    """Another batch has epochs of another length; a report beyond two rungs counts at the higher one alone."""
    rule = Asha(TOP1, grace=10, factor=3, end=90)
    assert told(rule, [("a", 12, 0.5), ("b", 9, 0.1), ("b", 18, 0.4)])[1:] == [
        None,
        "asha: val/top1 40.00 % after 18 images is below 50.00 %, the best third of 1 trial there",
    ]
    assert told(rule, [("c", 33, 0.1), ("c", 36, 0.0)]) == [None, None]  # the first at the second rung
    assert rule.hear("d", 31, 0.05)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("make", [lambda: Asha(TOP1, 10, 3, 90), lambda: Median(TOP1, 10, least=1)])
def test_what_is_no_number_is_the_worst(make, bad):
    rule = make()
    answers = told(rule, [("a", 10, -5.0), ("b", 10, bad), ("c", 10, -4.0)])
    assert answers[0] is answers[2] is None
    assert answers[1].endswith(": val/top1 is no finite number after 10 images")
    alone = make()
    assert told(alone, [("a", 10, bad), ("b", 10, bad), ("c", 10, -5.0)])[2] is None


# -- properties --------------------------------------------------------------------------------------------------------


@st.composite
def reports(draw):
    """Trials that report by turns: (id, samples, score, last)."""
    strides = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    turns = draw(st.lists(st.integers(0, len(strides) - 1), max_size=40))
    at, said = [0] * len(strides), []
    for turn in turns:
        if at[turn] < 40:
            at[turn] += strides[turn]
            score = draw(st.one_of(st.integers(0, 9).map(float), st.sampled_from([nan, inf, -inf])))
            said.append((f"t{turn}", at[turn], score, at[turn] >= 40))
    return said


RULES = {
    "asha": lambda: Asha(TOP1, grace=2, factor=2, end=40),
    "asha by 3": lambda: Asha("val/loss", grace=3, factor=3, end=47),
    "median": lambda: Median(TOP1, grace=4, least=2),
}


@pytest.mark.parametrize("kind", RULES)
@given(heard=reports(), cut=st.integers(0, 40), again=st.integers(0, 5))
def test_a_rule_that_is_built_anew_at_any_place_says_the_same(kind, heard, cut, again):
    """And what is heard twice gets the same answer twice, and changes nothing."""
    whole = told(RULES[kind](), heard)
    rule, cut = RULES[kind](), min(cut, len(heard))
    assert told(rule, heard[:cut]) == whole[:cut]
    twice = slice(max(cut - again, 0), cut)
    assert told(rule, heard[twice]) == whole[twice]
    assert told(rule, heard[cut:]) == whole[cut:]


@dataclass
class Said:
    """Successive halving that stops, said a second time, without Tune."""

    rungs: list[int]
    factor: int
    seen: dict[int, dict[str, float]] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)

    def stops(self, trial, samples, score, last):
        score = score if isfinite(score) else WORST
        reached = [rung for rung in self.rungs if rung <= samples]
        if not reached or (trial in self.stopped and not last):
            return trial in self.stopped and not last
        rung = self.seen.setdefault(reached[-1], {})
        before = list(rung.values()) if trial not in rung else []
        rung.setdefault(trial, score)
        if before and not last and score < np.percentile(before, 100 * (1 - 1 / self.factor)):
            self.stopped.add(trial)
        return trial in self.stopped and not last


@given(reports(), st.integers(1, 9), st.integers(2, 4))
def test_tunes_asha_is_the_rule_said_a_second_time(heard, grace, factor):
    rule = Asha(TOP1, grace, factor, end=40)
    said = Said(rule.rungs(), factor)
    assert [bool(answer) for answer in told(rule, heard)] == [said.stops(*r) for r in heard]


@given(st.integers(1, 10**6), st.one_of(st.integers(2, 5).map(float), st.floats(1.2, 9)), st.floats(0.1, 1000))
def test_the_rungs_are_those_of_tune(grace, factor, times):
    end = max(int(grace * times), 1)
    rule = Asha(TOP1, grace, factor, end)
    own = [ceil(rung) for rung, _ in reversed(rule._scheduler._brackets[0]._rungs)]
    assert rule.rungs() == [rung for rung in own if rung < end]


def test_without_a_rung_nobody_is_stopped():
    rule = Asha(TOP1, grace=30, factor=3, end=20)
    assert rule.rungs() == []
    assert told(rule, [("a", 10, 0.9), ("b", 10, 0.1), ("a", 20, 0.9), ("b", 20, 0.1)]) == [None] * 4


def test_what_stops_follows_from_the_journal():
    """Reports of all trials in the order in which they were heard, not trial by trial."""

    def trial(id, *at):
        made = [Report(order, epoch, 10 * epoch, {TOP1: top1}) for order, epoch, top1 in at]
        return Trial(id, {}, id, epochs=3, reports=tuple(made))

    trials = [trial("a", (1, 1, 0.9)), trial("b", (0, 1, 0.2), (2, 2, 0.3)), trial("c", (3, 1, 0.1), (4, 3, 0.1))]
    assert list(replay(Asha(TOP1, 10, 3, 90), trials, TOP1)) == ["c"]
    stopped = trial("c", (3, 1, 0.1))
    assert list(replay(Asha(TOP1, 10, 3, 90), [*trials[:2], stopped], TOP1)) == ["c"]
