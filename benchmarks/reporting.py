"""A training thread that reports points, and what each step of it took: what `benchmarks.tracking` measures.

Times lie in a file that is mapped into memory, row by row: they outlast a process that is killed, and whoever waits for
a step sees it without asking.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import torch

from orchestrator.context import Record
from orchestrator.progress import TRAINING

SIDE = 640  # of the matrices that a step multiplies: about 5 ms on one core
QUIET = 0.3  # cores that others use
EPOCH = 100  # steps
Report = Callable[[Record], object]


@dataclass(frozen=True)
class Job:
    """`bare` steps that report nothing, then `steps` of which every `every`-th reports a point."""

    way: str
    uri: str
    folder: str  # for times and words
    name: str
    bare: int
    steps: int
    every: int
    settle_s: float
    killed: bool = False  # right after the last step, by SIGKILL

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    @property
    def points(self) -> list[int]:
        """The steps, from 1 on, after which a point is reported."""
        return list(range(self.every, self.steps + 1, self.every))

    def times(self) -> Any:
        """float64 [bare + steps, 2]: seconds of each step, and of reporting after it; zero until it is done."""
        path, shape = Path(self.folder, "times"), (self.bare + self.steps, 2)
        return np.memmap(path, np.float64, "r+" if path.exists() else "w+", shape=shape)


def train(job: Job, report: Report) -> int:
    """Trains; returns how often `report` raised. A loop without a guard would have ended there, the first time."""
    torch.set_num_threads(1)
    matrix, times, errors = torch.rand(SIDE, SIDE), job.times(), 0
    _settle(job.settle_s)
    for row in range(job.bare + job.steps):
        began = time.perf_counter()
        matrix @ matrix
        done = time.perf_counter()
        step = row - job.bare + 1
        if step > 0 and step % job.every == 0:
            errors += not _reported(report, point(step))
        times[row] = done - began, time.perf_counter() - done
    if job.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return errors


def point(step: int) -> Record:
    """A record as the worker sends it at an interval's end."""
    own = {"kind": "progress", "time_ms": time.time_ns() // 1_000_000, "global_step": step, "left_s": 1.0}
    place = {"epoch": step // EPOCH, "step": step % EPOCH, "steps_per_epoch": EPOCH, "epochs": 90}
    return own | place | {name: 1 / (1 + step + number) for number, name in enumerate(TRAINING)}


def metrics(record: Record) -> dict[str, float]:
    """What the driver makes of a record, for those who log it themselves."""
    return {name: record[key] for key, name in TRAINING.items()} | {"train/epoch": record["global_step"] / EPOCH}


def _settle(most_s: float) -> None:
    """Until what this process's start has left is gone: Ray's own processes are busy for seconds after it."""
    limit = time.monotonic() + most_s
    while psutil.cpu_percent(1.0) / 100 * (os.cpu_count() or 1) > QUIET and time.monotonic() < limit:
        pass


def _reported(report: Report, record: Record) -> bool:
    try:
        report(record)
    except Exception:
        return False
    return True
