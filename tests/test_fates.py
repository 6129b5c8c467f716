"""How far trials may train: whatever the order in which they come, the same ones stop at the same places."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cluster.rules import Asha
from orchestrator.sweep.fates import Fate, fates
from orchestrator.sweep.rules import NoRule
from orchestrator.sweep.trial import Report, Trial

EPOCH, EPOCHS = 100, 9
METRIC = "val/top1"


def asha():
    return Asha(METRIC, EPOCH, 3, EPOCH * EPOCHS)


def trial(number, *scores, state="waiting", epochs=EPOCHS):
    reports = tuple(Report(0, k, k * EPOCH, {METRIC: score}) for k, score in enumerate(scores, 1))
    return Trial(f"t{number:03d}", {}, "", epochs=epochs, reports=reports, state=state)


def decide(*trials, rule=asha):
    return fates(trials, rule(), METRIC, lambda _: EPOCH)


def test_a_trial_goes_from_rung_to_rung_and_waits_for_those_born_before():
    first = decide(trial(1), trial(2), trial(3))
    assert first == {"t001": Fate(1), "t002": Fate(1), "t003": Fate(1)}
    # t002 came first to the rung after one epoch: it is compared with t001, which is not there yet
    assert decide(trial(1), trial(2, 0.5), trial(3))["t002"] == Fate(0)
    assert decide(trial(1, 0.4), trial(2, 0.5), trial(3))["t002"] == Fate(3)
    assert decide(trial(1, 0.6), trial(2, 0.5), trial(3))["t002"].why.startswith("asha: ")
    # t001 depends on nobody; the rungs are at 1 and 3 epochs, and at the end nobody is stopped
    assert decide(trial(1, 0.1), trial(2))["t001"] == Fate(3)
    assert decide(trial(1, 0.1, 0.1, 0.1), trial(2))["t001"] == Fate(EPOCHS)


def test_whoever_has_ended_is_not_waited_for_and_counts_where_it_came_to():
    assert decide(trial(1, state="failed"), trial(2, 0.5))["t002"] == Fate(3)
    assert decide(trial(1, 0.9, state="failed"), trial(2, 0.5))["t002"].why
    assert decide(trial(1, *[0.9] * EPOCHS, state="finished"), trial(2, 0.95)) == {"t002": Fate(3)}
    # t002 stops at the first rung, so t003 does not wait for it at the second
    assert decide(trial(1, 0.6, 0.6, 0.6), trial(2, 0.5), trial(3, 0.7, 0.7, 0.7))["t003"] == Fate(EPOCHS)


def test_a_last_report_never_stops_and_without_a_rule_nobody_waits():
    assert decide(trial(1, 0.9), trial(2, 0.1, epochs=1))["t002"] == Fate(1)
    assert decide(trial(1), trial(2, 0.1), rule=NoRule) == {"t001": Fate(EPOCHS), "t002": Fate(EPOCHS)}


def test_rungs_in_samples_are_met_by_the_first_epoch_that_reaches_them():
    longer = fates([trial(1)], asha(), METRIC, lambda _: 80)  # epochs of 80 images, rungs at 100 and 300
    assert longer["t001"] == Fate(2)


class World:
    """Runs trials in `slots` places; `chance` says who gets on next, and when everything is taken up anew."""

    def __init__(self, curves, slots, chance):
        self.curves, self.slots, self.chance = curves, slots, chance
        self.trials, self.running = [], {}

    def run(self):
        while len(self.trials) < len(self.curves) or not all(t.over for t in self.trials):
            while len(self.running) < self.slots and self._start():
                pass
            id = self.chance(sorted(self.running)) if self.running else None
            if id is None:  # the driver dies: what runs is taken up from what was reported
                self.running = {}
                continue
            self._epoch(id)
        return [(t.id, t.epoch, t.state) for t in self.trials]

    def _start(self):
        found = decide(*self.trials)
        for id, fate in found.items():
            if fate.why:
                self._put(replace(self._of(id), state="stopped"))
        ready = [id for id, fate in found.items() if fate.until and id not in self.running]
        if not ready and len(self.trials) < len(self.curves):
            self.trials.append(trial(len(self.trials) + 1))
            return self._start()
        if ready:
            self.running[ready[0]] = found[ready[0]].until
        return bool(ready)

    def _epoch(self, id):
        t = self._of(id)
        score = self.curves[int(id[1:]) - 1][t.epoch]
        t = replace(t, reports=(*t.reports, Report(0, t.epoch + 1, (t.epoch + 1) * EPOCH, {METRIC: score})))
        if t.epoch == EPOCHS:
            t = replace(t, state="finished")
        self._put(t)
        if t.over or t.epoch == self.running[id]:
            del self.running[id]

    def _of(self, id):
        return self.trials[int(id[1:]) - 1]

    def _put(self, t):
        self.trials[int(t.id[1:]) - 1] = t


scores = st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), min_size=EPOCHS, max_size=EPOCHS)


@given(curves=st.lists(scores, min_size=1, max_size=7), slots=st.integers(1, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_speed_slots_and_deaths_change_nothing(curves, slots, data):
    alone = World(curves, 1, lambda running: running[0]).run()
    deaths = iter([True, True, True])

    def chance(running):
        if data.draw(st.integers(0, 9)) == 0 and next(deaths, False):
            return None
        return data.draw(st.sampled_from(running))

    assert World(curves, slots, chance).run() == alone


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_epoch_beyond_a_rung_is_trained_by_who_stops_there(slots):
    curves = [[0.9] * EPOCHS, [0.1] * EPOCHS, [0.2] * EPOCHS, [0.95] * EPOCHS]
    ends = World(curves, slots, lambda running: running[-1]).run()
    assert ends == [("t001", 9, "finished"), ("t002", 1, "stopped"), ("t003", 1, "stopped"), ("t004", 9, "finished")]
