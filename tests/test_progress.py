"""What the driver makes of the workers' records: names, steps and times of all curves."""

import pytest

from orchestrator.config import RunConfig
from orchestrator.progress import Ear
from orchestrator.state.register import Register
from orchestrator.state.storage import Storage
from orchestrator.tracking import NullTracker
from tests.test_nodes import A, B

POINT = {
    "kind": "progress", "time_ms": 1700, "global_step": 50, "epoch": 0, "step": 50, "steps_per_epoch": 200, "epochs": 4,
    "lr": 0.1, "grad_norm": 2.5, "loss": 1.5, "top1": 0.25, "top5": 0.5, "images_per_s": 900.0, "data_wait": 0.125,
    "step_s": 0.28, "left_s": 10.0,
}  # fmt: skip
EPOCH = {
    "kind": "epoch", "time_ms": 1900, "global_step": 200, "epoch": 1, "train_loss": 1.25, "train_top1": 0.5,
    "val_loss": 1.0, "val_top1": 0.75, "val_top5": 0.875, "val_top1_best": 0.8125,
}  # fmt: skip
COUNTS = {"kind": "classes", "global_step": 200, "images": [3, 4], "right": [2, 4]}


class Tracker(NullTracker):
    """Remembers points and tags."""

    def __init__(self):
        self.points, self.tagged = [], []

    def metrics(self, points):
        self.points.append(points)

    def tags(self, values):
        self.tagged.append(values)

    @property
    def newest(self):
        return {point.key: point.value for point in self.points[-1]}


class Plan:
    steps_per_epoch = 200


@pytest.fixture
def tracker():
    return Tracker()


@pytest.fixture
def ear(tracker, tmp_path):
    register = Register(Storage(str(tmp_path)), {"train": 0, "val": 0}, print)
    return Ear(RunConfig(), Plan(), register, tracker, lambda text: None, lambda record: None)


def system(node, values):
    return {"kind": "system", "node": node, "time_ms": 1, "values": values}


def test_a_training_point_is_all_its_curves_at_its_step_and_time(ear, tracker):
    ear.hear([POINT])
    assert tracker.newest == {
        "train/loss": 1.5,
        "train/top1": 0.25,
        "train/top5": 0.5,
        "train/lr": 0.1,
        "train/grad_norm": 2.5,
        "train/epoch": 0.25,
        "perf/images_per_s": 900.0,
        "perf/data_wait": 0.125,
        "perf/step_s": 0.28,
    }
    assert {(point.step, point.timestamp_ms) for point in tracker.points[-1]} == {(50, 1700)}


def test_an_epoch_is_its_evaluation_and_the_best_so_far(ear, tracker):
    ear.hear([EPOCH])
    assert tracker.newest == {
        "train/epoch_loss": 1.25,
        "val/loss": 1.0,
        "val/top1": 0.75,
        "val/top5": 0.875,
        "val/error": 25.0,
        "val/top1_best": 0.8125,
    }
    assert {(point.step, point.timestamp_ms) for point in tracker.points[-1]} == {(200, 1900)}


def test_samples_of_nodes_go_with_the_next_training_point_and_no_other(ear, tracker):
    ear.hear([system("a", A), system("b", {"cpu_percent": 1.0}), system("b", B)])
    assert tracker.points == []
    ear.hear([POINT])
    assert (
        tracker.newest.items()
        >= {
            "train/loss": 1.5,
            "system/memory_percent": 70.5,
            "system/memory_percent_least": 60.0,
            "system/memory_percent_greatest": 81.0,
            "system/cpu_percent_greatest": 97.1,
            "gpu/power_w": 300.0,
        }.items()
    )
    assert {(point.step, point.timestamp_ms) for point in tracker.points[-1]} == {(50, 1700)}
    ear.hear([POINT | {"global_step": 100}])
    assert not [key for key in tracker.newest if key.startswith(("system/", "gpu/"))]


def test_the_worst_nodes_are_a_tag_where_they_changed(ear, tracker):
    ear.hear([system("node-1", A), system("node-3", B), POINT, EPOCH])
    ear.hear([EPOCH])
    assert tracker.tagged == [{"skiplane.worst_nodes": "cpu_percent node-3 97.1; memory_percent node-1 81.0"}]
    ear.hear([system("node-1", A | {"cpu_percent": 99.0}), EPOCH])
    assert tracker.tagged[1:] == [{"skiplane.worst_nodes": "cpu_percent node-1 99.0; memory_percent node-1 81.0"}]


def test_one_node_is_not_the_worst_of_all(ear, tracker):
    ear.hear([system("a", A), EPOCH])
    assert tracker.tagged == []


def test_the_counts_by_class_are_kept(ear):
    assert ear.classes == {}
    ear.hear([COUNTS, EPOCH])
    assert (ear.classes["images"], ear.classes["right"]) == ([3, 4], [2, 4])
