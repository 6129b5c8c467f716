"""What a worker counts: every step once, told now and then, and at the end."""

from types import SimpleNamespace

import pytest

from orchestrator.context import LocalContext
from orchestrator.meters import WORKER
from orchestrator.odometer import TELL_S, Odometer
from orchestrator.worker import Job, train

COUNTERS = {meter.name for meter in WORKER}
OWN = sorted(name for name in COUNTERS if not name.startswith(("cache_", "fetch")))  # where samples are in files


def step(step_s=0.0, wait_s=0.0, bad=0):
    return SimpleNamespace(step_s=step_s, wait_s=wait_s, bad=(None,) * bad)


class Ear(LocalContext):
    """Hears each word."""

    def __init__(self):
        super().__init__()
        self.words = []

    def count(self, run, amounts):
        super().count(run, amounts)
        self.words.append((run, amounts))


def test_steps_add_up_and_are_told_once():
    ear = Ear()
    odometer = Odometer(ear, "a", 32, dict)
    assert ear.words == [("a", dict.fromkeys(OWN, 0))]  # all are there from the start
    for bad in (0, 2, 1):
        odometer.add(step(0.5, 0.125, bad))
    assert len(ear.words) == 1
    odometer.tell()
    expected = {"images_total": 96, "steps_total": 3, "step_seconds_total": 1.5, "data_wait_seconds_total": 0.375}
    assert ear.words[1] == ("a", dict.fromkeys(OWN, 0) | expected | {"bad_images_total": 3})
    odometer.tell()
    assert ear.words[2] == ear.words[0]


def test_it_tells_by_itself_after_seconds_of_training():
    ear = Ear()
    odometer = Odometer(ear, "a", 1, dict)
    for _ in range(8):
        odometer.add(step(TELL_S / 4, TELL_S / 4))
    assert [amounts["steps_total"] for _, amounts in ear.words] == [0] + [2] * 4


def test_totals_of_what_brings_the_data_are_told_as_what_came():
    ear, totals = Ear(), [{"cache_hits_total": 5}, {"cache_hits_total": 5}, {"cache_hits_total": 9}]
    odometer = Odometer(ear, "a", 1, lambda: totals.pop(0))
    for _ in range(2):
        odometer.tell()
    assert [amounts["cache_hits_total"] for _, amounts in ear.words] == [5, 0, 4]


def test_seconds_of_other_things_are_counted_even_where_they_fail():
    ear = Ear()
    odometer = Odometer(ear, "a", 1, dict)
    with odometer.timing("evaluation"):
        pass
    with pytest.raises(ZeroDivisionError), odometer.timing("evaluation"):
        raise ZeroDivisionError
    odometer.tell()
    assert ear.counted["evaluation_seconds_total"] > 0


def test_a_run_counts_all_that_it_trains(settings_for):
    config = settings_for("--name", "counted", "--model.width", "4", "--train.epochs", "2")
    ear = Ear()
    summary = train(Job(config, label="sweep/counted"), ear)
    assert {run for run, _ in ear.words} == {"sweep/counted"}
    assert ear.counted.keys() == {*OWN}
    assert ear.counted["steps_total"] == summary["steps"]
    assert ear.counted["images_total"] == summary["steps"] * config.train.global_batch
    assert ear.counted["bad_images_total"] == 0
    spent = [ear.counted[f"{what}_seconds_total"] for what in ("step", "data_wait", "evaluation", "checkpoint")]
    assert min(spent) > 0
    assert sum(spent) < summary["seconds"] + 1
