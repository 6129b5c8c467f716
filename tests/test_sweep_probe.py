"""The probe: the real step and evaluation on synthetic batches, scaled to what a worker does."""

from dataclasses import replace

import pytest
import torch

from orchestrator.sweep import probe as module
from orchestrator.sweep.outlook import Speed, Work
from orchestrator.sweep.probe import measure
from orchestrator.training.models import cost
from orchestrator.training.models.arch import Arch
from pipelines.errors import ConfigError

WORK = Work(Arch("cifar", 8, "B", width=4, stem="small", classes=7), 4, 6, 8, 8, 5)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Clock:
    """In place of the measurement: a second for each image of a step and a tenth for one evaluated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Work] = []
        monkeypatch.setattr(module, "_timed_speed", self)

    def __call__(self, work: Work, device: torch.device, seconds: float) -> Speed:
        self.asked.append(work)
        return Speed(float(work.lanes * work.micro_batch), 0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reduce": "exact", "lanes_per_pass": 1},
        {"reduce": "ordered"},
        {"precision": "bf16"},
        {"channels_last": True},
        {"lanes_per_pass": 3},
        {"micro_batch": 1},
        {"eval_size": 16, "eval_batch": 1},
    ],
)
def test_a_step_and_an_evaluation_of_any_kind_are_measured(change) -> None:
    work = replace(WORK, **change)
    found = measure([work], threads=1, seconds=0.0)
    assert list(found.speeds) == [work]
    assert found.speeds[work].step > 0
    assert found.speeds[work].image > 0
    assert found.where == "this machine's CPU, 1 thread"


def test_threads_are_a_workers_and_left_as_they_were(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(module, "_timed_speed", lambda *_: seen.append(torch.get_num_threads()) or Speed(1.0, 1.0))
    assert measure([WORK], threads=2).where == "this machine's CPU, 2 threads"
    assert (seen, torch.get_num_threads()) == ([2], before)


def test_one_lane_is_timed_and_stands_for_all(clock: Clock) -> None:
    found = measure([WORK, replace(WORK, lanes=2)])
    assert clock.asked == [replace(WORK, lanes=1)]
    assert [speed.step for speed in found.speeds.values()] == [24.0, 12.0]
    assert {speed.image for speed in found.speeds.values()} == {0.1}


def test_of_a_large_net_fewer_images_are_timed_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def timed(call, device, seconds) -> float:
        call()
        return 3.0

    build = module._batch
    monkeypatch.setattr(module, "_timed", timed)
    monkeypatch.setattr(module, "_batch", lambda work, count, *more: seen.append(count) or build(work, count, *more))
    monkeypatch.setattr(module, "AT_ONCE", 3 * cost.multiply_adds(WORK.arch, 8))
    assert measure([WORK]).speeds[WORK] == Speed(3.0 * 6 / 3 * 4, 1.0)  # 3 of 6 images, one of 4 lanes
    assert seen == [3, 3]


def test_with_many_kinds_of_work_some_are_measured_and_the_others_scaled(clock: Clock) -> None:
    nets = [replace(WORK, arch=replace(WORK.arch, width=width)) for width in range(4, 44)]
    found = measure(nets)
    assert len(clock.asked) == module.MEASURED
    assert {work.arch.width for work in clock.asked} >= {4, 43}  # the cheapest and the dearest
    assert list(found.speeds) == nets
    asked = {work.arch for work in clock.asked}
    for work, speed in found.speeds.items():
        if work.arch in asked:
            assert speed == Speed(24.0, 0.1)
        else:
            near = min(asked, key=lambda arch: abs(cost.multiply_adds(arch, 8) - cost.multiply_adds(work.arch, 8)))
            ratio = cost.multiply_adds(work.arch, 8) / cost.multiply_adds(near, 8)
            assert (speed.step, speed.image) == pytest.approx((24.0 * ratio, 0.1 * ratio))


def test_what_does_not_fit_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> Speed:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_timed_speed", full)
    with pytest.raises(
        ConfigError, match=r"^train.global_batch and data.lanes give a worker 1 lanes of 6 images, and "
    ):
        measure([WORK])
