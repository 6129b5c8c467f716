"""What a sweep's driver decides, with a stand-in for everything that trains; and that the journal alone carries it."""

from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cluster.rules import Asha, Median
from orchestrator.state.records import Result, write_result
from orchestrator.state.storage import Storage
from orchestrator.stop import Stop
from orchestrator.sweep import director as module
from orchestrator.sweep import tries
from orchestrator.sweep.director import SweepDirector
from orchestrator.sweep.journal import Journal
from orchestrator.sweep.rules import NoRule
from orchestrator.sweep.search import Draw, Listed
from orchestrator.sweep.trial import Trial
from pipelines.errors import DataError

EPOCH, EPOCHS, METRIC = 100, 9, "val/top1"
RULES = {
    "none": NoRule,
    "asha": lambda: Asha(METRIC, EPOCH, 3, EPOCH * EPOCHS),
    "median": lambda: Median(METRIC, EPOCH, least=2),
}


class Killed(Exception):
    """The sweep's driver is gone."""


class Births:
    """Trials whose scores are given: curves[k] of the k-th, by epoch."""

    def __init__(self, folder, workers="1"):
        self.folder_of_all, self.workers, self.closed = folder, workers, []

    def bear(self, number, draw):
        return Trial(f"t{number:03d}", draw.point, f"net {number}", epochs=EPOCHS, workers=self.workers)

    def folder(self, trial):
        return str(self.folder_of_all / trial.id)

    def task(self, trial, until, workers):
        return str(until)

    def epoch_samples(self, trial):
        return EPOCH

    def close(self, trial):
        self.closed.append(trial.id)


class Places:
    """Places for workers."""

    def __init__(self, total):
        self.total, self.taken = total, {}

    def take(self, id, workers):
        if sum(self.taken.values()) + int(workers) > self.total:
            return None
        self.taken[id] = int(workers)
        return workers

    def give(self, id):
        self.taken.pop(id, None)


class World:
    """Slots that train: each `tick` is one epoch of one trial. What a run has done outlives the driver."""

    def __init__(self, folder, curves, *, rule="asha", slots=2, workers="1", limit=None):
        self.folder, self.curves, self.slots, self.limit = folder, curves, slots, limit
        self.births, self.rule, self.done = Births(folder, workers), RULES[rule], {}
        self.submit()

    def submit(self):
        """A driver, the first or one that takes over."""
        self.stop, self.said, self.asked, self.running = Stop(), [], {}, {}
        self.places = Places(self.slots)
        self.director = SweepDirector(
            self.births, Listed([{"k": k} for k in range(len(self.curves))]), self.rule, METRIC,
            Journal(Storage(str(self.folder))), self.places, self.asked.__setitem__, self.said.append,
            lambda trials: None, self.stop, limit=self.limit,
        )  # fmt: skip

    def fill(self):
        while given := self.director.next():
            self.running[given.id] = int(given.what)

    def tick(self, id):
        """One epoch of a trial, as its slot would tell it: what is there already comes first."""
        done, curve = self.done.setdefault(id, 0), self.curves[int(id[1:]) - 1]
        news = [record("recalled", k, curve[k]) for k in range(done)]
        if done < self.running[id]:
            self.done[id] = done + 1
            news.append(record("epoch", done, curve[done]))
        self.director.heard(id, news)
        if id in self.asked:
            self.end(id, "stopped")
        elif self.done[id] >= self.running[id]:
            self.end(id, "finished" if self.done[id] == EPOCHS else "stopped")

    def end(self, id, state, reason=None):
        curve = [{**record("", k, score), "epoch": k + 1} for k, score in enumerate(self.curves[int(id[1:]) - 1])]
        del self.running[id]
        self.director.ended(id, {"state": state, "reason": reason, "curve": curve[: self.done.get(id, 0)],
                                 "weights_sha256": f"{id} after {self.done.get(id, 0)}", "seconds": 1.0})  # fmt: skip

    def run(self, choose=min):
        while not self.director.over():
            self.fill()
            if self.running:
                self.tick(choose(self.running))
        return self.ends()

    def ends(self):
        return [
            (t.id, t.state, t.epoch, t.weights_sha256) for t in Journal(Storage(str(self.folder))).trials().values()
        ]


def record(kind, epoch, score):
    return {"kind": kind, "epoch": epoch + 1, "val_top1": score, "train_loss": 1 - score, "time_ms": 0}


def clock(monkeypatch):
    """[seconds], which the test moves."""
    now = [1000.0]
    for seen in (module, tries):
        monkeypatch.setattr(seen, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


FLAT = [[score] * EPOCHS for score in (0.6, 0.5, 0.8, 0.7)]


def test_a_sweep_runs_to_its_end_and_keeps_what_became_of_each_trial(tmp_path):
    world = World(tmp_path, FLAT)
    assert world.run() == [
        ("t001", "finished", 9, "t001 after 9"),
        ("t002", "stopped", 1, "t002 after 1"),  # exactly at the rung, not an epoch more
        ("t003", "finished", 9, "t003 after 9"),
        ("t004", "stopped", 3, "t004 after 3"),  # above two thirds of the way at the first, below it at the second
    ]
    stopped = next(line for line in world.said if line.startswith("t002"))
    assert stopped.startswith("t002 net 2 stopped: asha: ")
    assert sorted(world.births.closed) == ["t001", "t002", "t003", "t004"]
    assert not world.places.taken


@given(data=st.data(), rule=st.sampled_from(["asha", "none"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_driver_that_dies_anywhere_is_followed_by_one_that_ends_the_same(tmp_path_factory, data, rule):
    scores = st.lists(st.sampled_from([0.1, 0.4, 0.6, 0.9]), min_size=EPOCHS, max_size=EPOCHS)
    curves = data.draw(st.lists(scores, min_size=1, max_size=4))
    calm = World(tmp_path_factory.mktemp("calm"), curves, rule=rule, slots=1).run()
    world = World(tmp_path_factory.mktemp("wild"), curves, rule=rule, slots=data.draw(st.integers(1, 3)))
    for _ in range(data.draw(st.integers(0, 4))):
        for _ in range(data.draw(st.integers(0, 6))):
            world.fill()
            if world.running:
                world.tick(data.draw(st.sampled_from(sorted(world.running))))
        world.submit()
    assert world.run(lambda running: data.draw(st.sampled_from(sorted(running)))) == calm


def test_what_a_trial_said_last_is_not_lost_with_the_driver_and_it_does_not_run_again(tmp_path):
    world = World(tmp_path, FLAT[:1], rule="none")
    world.fill()
    curve = [{"epoch": k + 1, "val_top1": 0.5 + k / 100, "train_loss": 1.0} for k in range(EPOCHS)]
    ended = Result("t001", "finished", EPOCHS, 99, weights_sha256="abc", seconds=7.0, curve=curve)
    write_result(Storage(str(tmp_path / "t001")), ended)
    world.submit()
    assert world.director.next() is None
    assert world.director.over()
    (trial,) = world.director.trials
    assert (trial.state, trial.epoch, trial.value(METRIC), trial.weights_sha256) == ("finished", 9, 0.58, "abc")


def test_a_trial_that_stops_where_a_driver_died_in_between_has_its_weights(tmp_path):
    world = World(tmp_path, FLAT[:2])
    world.fill()
    world.tick("t001")
    world.director.heard("t002", [record("epoch", 0, 0.5)])
    write_result(Storage(str(tmp_path / "t002")), Result("t002", "stopped", 1, 11, weights_sha256="abc", seconds=7.0))
    world.submit()
    trial = world.director.trials[1]
    assert (trial.state, trial.weights_sha256, trial.seconds) == ("stopped", "abc", 7.0)


def test_a_trial_whose_driver_dies_is_tried_again_later_and_fails_in_the_end(tmp_path, monkeypatch):
    now = clock(monkeypatch)
    world = World(tmp_path, FLAT[:1], rule="none")
    for pause in (5, 10, 20, 40, None):
        assert not world.director.over()
        world.fill()
        assert list(world.running) == ["t001"]
        world.running.clear()
        world.director.died("t001", "out of memory")
        if pause:
            assert world.said[-1] == f"t001: the trial's driver died: out of memory; it is tried again in {pause} s"
            now[0] += pause - 1
            assert world.director.next() is None
            now[0] += 1
    (trial,) = world.director.trials
    assert (trial.state, trial.failures) == ("failed", tries.TRIES)
    assert trial.reason == "the trial's driver died: out of memory"
    assert world.director.over()
    assert world.births.closed == ["t001"]


def test_progress_counts_as_a_new_beginning(tmp_path, monkeypatch):
    now = clock(monkeypatch)
    world = World(tmp_path, FLAT[:1], rule="none")
    for epoch in range(tries.TRIES + 2):
        world.fill()
        world.director.heard("t001", [record("epoch", epoch, 0.5)])
        world.director.died("t001", "its node is lost")
        now[0] += 100
    assert (world.director.trials[0].state, world.director.trials[0].failures) == ("waiting", 1)


def test_for_want_of_the_cluster_no_trial_fails_but_the_sweep_ends_and_goes_on(tmp_path, monkeypatch):
    now = clock(monkeypatch)
    world = World(tmp_path, FLAT[:2], rule="none", slots=1)
    for pause in (5, 10, 20, 40):
        world.fill()
        world.end("t001", "lacking", "MLflow does not answer")
        assert world.said[-1] == f"t001: MLflow does not answer; it is tried again in {pause} s"
        now[0] += pause
    world.fill()
    world.end("t001", "lacking", "MLflow does not answer")
    assert world.director.lacks == "trial t001 could not go on, 5 times in a row: MLflow does not answer"
    assert world.director.over()
    world.submit()
    assert [end[1] for end in world.run()] == ["finished", "finished"]


def test_what_does_not_fit_is_said_and_waited_for_and_a_node_may_come(tmp_path, monkeypatch):
    now = clock(monkeypatch)
    world = World(tmp_path, FLAT[:1], rule="none", slots=2, workers="3")
    words = "t001 needs 3 workers, the cluster has room for 2"
    for _ in range(3):
        assert world.director.next() is None
        now[0] += 20
    assert world.said == [f"waiting: {words}"]
    world.places.total = 3
    assert world.director.next()
    world.running["t001"] = EPOCHS
    world.end("t001", "died", "its node is lost")
    world.places.total = 2
    for _ in range(5):
        now[0] += 20
        assert world.director.next() is None
    assert world.director.lacks == f"{words}, after cluster.wait_seconds = 60"


def test_an_epoch_that_a_stop_left_unevaluated_is_evaluated_and_holds_nothing_up(tmp_path):
    world = World(tmp_path, FLAT[:1], rule="none")
    world.fill()
    curve = [{"epoch": k + 1, "val_top1": 0.5, "train_loss": 1.0} for k in range(EPOCHS - 1)]
    write_result(Storage(str(tmp_path / "t001")), Result("t001", "stopped", EPOCHS, 99, curve=curve))
    world.submit()
    world.fill()  # what it has is taken in
    world.fill()
    assert list(world.running) == ["t001"]


def test_a_trial_that_finishes_while_the_sweep_stops_has_its_last_report(tmp_path):
    world = World(tmp_path, [[0.5] * 8 + [0.99]], rule="none")
    world.fill()
    for _ in range(EPOCHS - 1):
        world.tick("t001")
    world.stop.ask("SIGTERM")
    world.director.heard("t001", [])
    assert world.asked == {"t001": "SIGTERM"}
    world.done["t001"] = EPOCHS
    world.end("t001", "finished")
    assert world.director.trials[0].value(METRIC) == 0.99
    assert world.ends()[0][:3] == ("t001", "finished", 9)


def test_who_has_no_slot_yet_is_not_waited_for_when_the_sweep_stops(tmp_path, monkeypatch):
    now = clock(monkeypatch)
    world = World(tmp_path, FLAT[:2], rule="none")
    world.fill()
    world.tick("t001")
    now[0] += 31
    world.director.next()
    assert world.said == ["t002 waits for its driver to start, most likely for free memory on a node"]
    world.stop.ask("SIGTERM")
    assert not world.director.abandons()
    world.tick("t001")
    assert world.director.abandons()
    world.director.leave()
    assert [end[1] for end in world.ends()] == ["waiting", "waiting"]
    assert world.director.over()


def test_a_trial_whose_donor_is_gone_fails_by_itself(tmp_path):
    world = World(tmp_path, FLAT[:2], rule="none")
    task = world.births.task

    def gone(trial, until, workers):
        if trial.id == "t001":
            raise DataError("the donor has no checkpoint")
        return task(trial, until, workers)

    world.births.task = gone
    assert [end[:2] for end in world.run()] == [("t001", "failed"), ("t002", "finished")]
    assert not world.places.taken


def test_a_failed_trial_does_not_end_the_sweep_but_too_many_do(tmp_path):
    world = World(tmp_path / "a", FLAT, rule="none", slots=1)
    world.fill()
    world.end("t001", "failed", "the loss is not finite")
    assert [end[1] for end in world.run()] == ["failed", "finished", "finished", "finished"]
    world = World(tmp_path / "b", FLAT, rule="none", slots=2, limit=0)
    world.fill()
    world.end("t001", "failed", "the loss is not finite")
    assert world.director.gives_up
    world.fill()
    assert list(world.running) == ["t002"]  # nothing new starts, and what runs is asked to save itself
    world.tick("t002")
    assert world.asked == {"t002": "too many trials failed"}
    assert world.director.over()
    assert [end[1] for end in world.ends()] == ["failed", "waiting"]


def test_a_signal_lets_nothing_start_and_what_runs_goes_on_next_time(tmp_path):
    world = World(tmp_path, FLAT, rule="none")
    world.fill()
    world.tick("t001")
    world.stop.ask("SIGTERM")
    world.tick("t001")
    world.tick("t002")
    assert world.asked == {"t001": "SIGTERM", "t002": "SIGTERM"}
    assert world.director.over()
    assert world.director.next() is None
    assert [end[1] for end in world.ends()] == ["waiting", "waiting"]
    world.submit()
    assert [end[:3] for end in world.run()] == [(f"t00{k}", "finished", 9) for k in range(1, 5)]


def test_the_median_rule_stops_while_a_trial_trains_and_what_it_says_after_that_does_not_count(tmp_path):
    world = World(tmp_path, [[0.9] * EPOCHS, [0.8] * EPOCHS, [0.1] * EPOCHS], rule="median", slots=3)
    world.fill()
    for id in ("t001", "t002", "t003"):
        world.tick(id)
    assert list(world.asked) == ["t003"]
    assert world.asked["t003"].startswith("median: ")
    assert [end[:3] for end in world.ends()][2] == ("t003", "stopped", 1)
    world.submit()  # and whoever takes over agrees, though the order of reports is all there is
    assert world.director.trials[2].state == "stopped"


@pytest.mark.parametrize(("workers", "slots", "at_once"), [("1", 3, 3), ("2", 3, 1), ("2", 4, 2), ("3", 2, 0)])
def test_a_trial_starts_only_where_its_whole_group_fits(tmp_path, workers, slots, at_once):
    world = World(tmp_path, FLAT, rule="none", slots=slots, workers=workers)
    world.fill()
    assert len(world.running) == at_once


def test_a_trial_that_cannot_be_trained_is_born_failed_and_others_go_on(tmp_path):
    world = World(tmp_path, FLAT[:2], rule="none")
    bear = world.births.bear

    def refuse(number, draw):
        if number == 1:
            return Trial("t001", draw.point, "k=0", state="failed", reason="does not fit")
        return bear(number, draw)

    world.births.bear = refuse
    world.births.epoch_samples = lambda trial: {"t002": EPOCH}[trial.id]  # of t001 there is none
    assert [end[:2] for end in world.run()] == [("t001", "failed"), ("t002", "finished")]


def test_nothing_is_born_while_nothing_fits(tmp_path):
    world = World(tmp_path, FLAT, rule="none", slots=1)
    world.fill()
    assert len(world.director.trials) == 1
    world.end("t001", "failed", "x")
    assert world.director.next().id == "t002"


def test_draws_are_asked_for_in_order():
    assert Listed([{"a": 1}, {"a": 2}]).next([Trial("t001", {}, "")]) == Draw({"a": 2})
