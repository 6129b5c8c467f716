"""How fast nets are on this machine: a step and an evaluation image, measured for about a second a net.

The product's own step on one synthetic batch: neither decoding nor the sum over workers is in it. It serves an
estimate, and is no benchmark.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import torch

from orchestrator.sweep.outlook import Probe, Speed, Work
from orchestrator.training.evaluate import evaluate
from orchestrator.training.models import cost
from orchestrator.training.models.resnet import build
from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD
from orchestrator.training.step import TrainStep
from pipelines.batches import Batch, SyntheticBatches
from pipelines.errors import ConfigError

SECONDS = 0.7  # of steps, and as much of evaluation, after a first one that makes memory and kernels ready
MEASURED = 12  # kinds of work at most; the others are scaled from the nearest by their multiply-adds
AT_ONCE = 16e9  # multiply-adds forward that a CPU is given at once: of a large net fewer images are timed, and scaled
LR = 1e-3  # small: the numbers must stay finite, what they are does not matter


def measure(works: Sequence[Work], threads: int = 1, seconds: float = SECONDS) -> Probe:
    """The speed of each kind of work, on the GPU where there is one, else on so many threads of the CPU.

    A CPU takes as long for many lanes as for one so many times, so one is timed; a GPU runs the worker's lanes as
    training would. Raises ConfigError for a step that does not fit the GPU's memory.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    unit = {work: work if device.type == "cuda" else replace(work, lanes=1) for work in works}
    with _threads(threads):
        chosen = _spread(sorted(set(unit.values()), key=_multiply_adds))
        known = {work: _speed(work, device, seconds) for work in chosen}
    speeds = {work: _scaled(work, known) for work in works}
    return Probe(speeds, _where(device, threads))


def _speed(work: Work, device: torch.device, seconds: float) -> Speed:
    try:
        return _timed_speed(work, device, seconds)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"train.global_batch and data.lanes give a worker {work.lanes} lanes of {work.micro_batch} images, and "
            f"{work.arch.name} with {work.size} px does not fit this GPU's memory; set --train.lanes_per_pass 1"
        ) from error


def _timed_speed(work: Work, device: torch.device, seconds: float) -> Speed:
    count = _at_once(work.micro_batch, cost.multiply_adds(work.arch, work.size), device)
    scored = _at_once(work.eval_batch, cost.multiply_adds(work.arch, work.eval_size), device)
    step = TrainStep(
        build(work.arch, seed=0),
        lanes=work.lanes,
        total_lanes=work.lanes,
        micro_batch=count,
        lanes_per_pass=0 if work.reduce == "exact" else work.lanes_per_pass,
        reduce=work.reduce,
        precision=work.precision,
        channels_last=work.channels_last,
        device=device,
    )
    batch, evaluation = (
        _batch(work, count * work.lanes, work.size, device),
        _batch(work, scored, work.eval_size, device),
    )
    in_step = _timed(lambda: step(batch.images, batch.labels, LR), device, seconds)
    in_evaluation = _timed(
        lambda: evaluate(
            step.model,
            [evaluation],
            IMAGENET_MEAN,
            IMAGENET_STD,
            precision=work.precision,
            device=device,
            channels_last=work.channels_last,
        ),
        device,
        seconds,
    )
    return Speed(in_step * work.micro_batch / count, in_evaluation / scored)


def _batch(work: Work, count: int, size: int, device: torch.device) -> Batch:
    batches = SyntheticBatches(
        n=count, size=size, classes=work.arch.classes, start=0, stop=1, steps_per_epoch=1, device=device
    )
    return next(iter(batches))


def _timed(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median seconds of a call, over about `seconds`; the first one is not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    times = [_once(call, wait) for _ in range(2)][1:]
    while sum(times) < seconds:
        times.append(_once(call, wait))
    return median(times)


def _once(call: Callable[[], object], wait: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _at_once(images: int, multiply_adds: int, device: torch.device) -> int:
    """How many of the images are timed: two at least, for BatchNorm."""
    return images if device.type == "cuda" else min(images, max(2, int(AT_ONCE // multiply_adds)))


def _scaled(work: Work, known: dict[Work, Speed]) -> Speed:
    """Of work that was measured, with as many lanes or with one; else of the one with the nearest multiply-adds."""
    for lanes in (work.lanes, 1):
        if (same := replace(work, lanes=lanes)) in known:
            return Speed(known[same].step * work.lanes / lanes, known[same].image)
    near = min(known, key=lambda other: abs(_multiply_adds(other) / other.lanes - _multiply_adds(work) / work.lanes))
    scale = cost.multiply_adds(work.arch, work.eval_size) / cost.multiply_adds(near.arch, near.eval_size)
    return Speed(known[near].step * _multiply_adds(work) / _multiply_adds(near), known[near].image * scale)


def _spread(works: Sequence[Work]) -> list[Work]:
    """MEASURED of them, evenly from the cheapest to the dearest."""
    if len(works) <= MEASURED:
        return list(works)
    return [works[i * (len(works) - 1) // (MEASURED - 1)] for i in range(MEASURED)]


def _multiply_adds(work: Work) -> int:
    """Of a step's images, forward."""
    return cost.multiply_adds(work.arch, work.size) * work.micro_batch * work.lanes


def _where(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return f"this machine's {torch.cuda.get_device_name(device)}"
    return f"this machine's CPU, {threads} thread{'s' * (threads > 1)}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nothing() -> None:
    """A CPU's work is done when its call returns."""
