"""The training loop: batches in, finished steps out. It neither prints, saves nor logs; who drives it decides that."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from orchestrator.training.schedule import Schedule
from orchestrator.training.step import StepStats, TrainStep
from pipelines.errors import TrainingError

LAG = 2  # steps between asking and everyone hearing it: a device is never waited for that is less than this behind


class TrainBatch(Protocol):
    """What training needs of a batch."""

    images: Tensor  # uint8 [n, S, S, 3] on the device, lane after lane
    labels: Tensor  # int64 [n] on the device
    epoch: int
    step: int
    digest: int

    @property
    def bad(self) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class StepDone:
    """A finished step; the net is that after `global_step` while the consumer holds it.

    wait_s: seconds spent waiting for the batch. step_s: seconds in the step; on a GPU, until it was queued.
    asked: the sum of what the ranks asked for LAG steps ago; the same at the same step on all ranks.
    """

    global_step: int
    epoch: int
    step: int
    lr: float
    stats: StepStats
    digest: int
    bad: tuple[Any, ...]
    wait_s: float
    step_s: float
    asked: int


def train(
    step: TrainStep,
    batches: Iterable[TrainBatch],
    lr_of_step: Schedule,
    *,
    steps_per_epoch: int,
    start: int,
    stop: int,
    request: Callable[[], float] = lambda: 0.0,
    colour: Callable[[Any], Tensor | None] = lambda batch: None,
) -> Iterator[StepDone]:
    """Steps `start` to `stop` - 1, counted over the whole run; yields after each.

    batches: in order from step `start`; TrainingError where one is missing or not the one whose turn it is.
    request: called once a step; whole numbers, whose sum over ranks all of them hear LAG steps later as `asked`. What
    is asked in the last LAG steps ends with the run.
    colour: float32 [n, 3] to add to a batch's images in units of 0..1, or None.
    """
    heard = Delayed(LAG)
    source = iter(batches)
    for global_step in range(start, stop):
        began = time.perf_counter()
        batch = _take(source, *divmod(global_step, steps_per_epoch))
        got = time.perf_counter()
        lr = lr_of_step(global_step)
        stats = step(batch.images, batch.labels, lr, request(), colour(batch))
        asked = round(heard.swap(stats.request))
        wait_s, step_s = got - began, time.perf_counter() - got
        yield StepDone(global_step, batch.epoch, batch.step, lr, stats, batch.digest, batch.bad, wait_s, step_s, asked)


class Delayed:
    """Brings a device's scalar to the host `lag` calls later, without waiting for the newer ones."""

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._underway: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def swap(self, value: Tensor) -> float:
        """Hand in this call's value, get that of `lag` calls ago; 0 while there is none."""
        self._underway.append(_send(value))
        if len(self._underway) <= self._lag:
            return 0.0
        host, arrived = self._underway.popleft()
        if arrived is not None:
            arrived.synchronize()
        return float(host)


def _send(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if value.device.type != "cuda":
        return value, None
    host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return host, arrived


def _take(source: Iterator[TrainBatch], epoch: int, step: int) -> TrainBatch:
    batch = next(source, None)
    if batch is None:
        raise TrainingError(f"the data ended before epoch {epoch}, step {step}")
    if (batch.epoch, batch.step) != (epoch, step):
        raise TrainingError(f"the data is at epoch {batch.epoch}, step {batch.step}; training is at {epoch}, {step}")
    return batch
