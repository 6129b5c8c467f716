"""What a scrape sees of a run: its driver's words, second by second."""

import threading
from types import SimpleNamespace

import pytest

from orchestrator.meters import RUN, WORKER, by_name
from orchestrator.vitals import Vitals

PLAN = SimpleNamespace(steps=400, steps_per_epoch=40)


class Stage:
    """Vitals of a run that was at step 40, and a clock."""

    def __init__(self):
        self.now, self.shown, self.came = 100.0, [], threading.Event()
        self.tried = SimpleNamespace(restarts=0, resizes=0, repeated=0)
        self.vitals = Vitals("a", PLAN, self.tried, self._show, lambda: self.now)

    def _show(self, labels, values):
        self.shown.append((labels, values))
        self.came.set()

    def hear(self, *records):
        self.vitals.hear(records)
        return self.vitals.values()


def restored(step):
    return {"kind": "restored", "global_step": step, "source": ""}


def point(step, step_s=0.5, data_wait=0.2):
    values = {"loss": 1.5, "top1": 0.25, "left_s": 30.0, "step_s": step_s, "data_wait": data_wait}
    return {"kind": "progress", "global_step": step, **values}


@pytest.fixture
def stage():
    return Stage()


def test_before_a_group_says_where_it_begins_only_counts_are_known(stage):
    expected = {"workers": 0, "restarts": 0, "resizes": 0, "steps_repeated": 0, "goodput_ratio": 0}
    assert stage.vitals.values() == expected | {"steps_done": 0, "steps_planned": 400, "epochs_done": 0}


def test_a_run_at_work(stage):
    stage.hear(restored(40), {"kind": "at", "global_step": 47})
    assert stage.vitals.values()["steps_done"] == 47
    stage.now += 16.0
    found = stage.hear(point(50), {"kind": "epoch", "val_top1": 0.75}, {"kind": "epoch"})
    assert found["goodput_ratio"] == pytest.approx(0.25)  # ten steps of 0.5 s, of which 0.1 s is waiting: 4 of 16 s
    assert (found["steps_done"], found["epochs_done"], found["left_seconds"]) == (50, 1.25, 30.0)
    assert (found["training_loss"], found["training_top1_ratio"], found["validation_top1_ratio"]) == (1.5, 0.25, 0.75)
    assert found.keys() == by_name(RUN).keys()


def test_steps_that_are_done_again_are_of_no_use(stage):
    stage.hear(restored(40), point(50, data_wait=0.0))
    stage.tried.restarts, stage.tried.repeated = 1, 6
    stage.now += 10.0
    found = stage.hear(restored(44), {"kind": "at", "global_step": 45})
    assert found["goodput_ratio"] == pytest.approx(0.2)
    assert (found["steps_done"], found["restarts"], found["steps_repeated"]) == (45, 1, 6)


def test_workers_are_there_with_their_group(stage):
    with stage.vitals.group(3):
        assert stage.vitals.values()["workers"] == 3
    assert stage.vitals.values()["workers"] == 0


def test_gauges_are_set_while_it_is_entered_and_no_longer(stage):
    with stage.vitals:
        assert stage.came.wait(10)
    count = len(stage.shown)
    assert stage.shown[0][0] == {"run": "a"}
    assert not [thread for thread in threading.enumerate() if thread.name == "vitals"]
    assert len(stage.shown) == count >= 1


def test_a_name_says_what_a_metric_is():
    """Counters are of ranks and end in _total, gauges of runs; seconds and bytes are base units."""
    names = [meter.name for meter in (*WORKER, *RUN)]
    assert len({*names}) == len(names)
    assert [meter.labels for meter in WORKER] == [("run", "rank")] * len(WORKER)
    assert [meter.labels for meter in RUN] == [("run",)] * len(RUN)
