"""What a scrape sees of a run as a whole: set by its driver once a second, and gone 20 s after the driver."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, Self

from orchestrator.cluster import metering
from orchestrator.context import Record
from orchestrator.goodput import Goodput
from orchestrator.plan import Plan

EVERY_S = 1.0  # Ray drops a gauge that was not set for two of its intervals, 20 s
SHOWN = {"loss": "training_loss", "top1": "training_top1_ratio", "left_s": "left_seconds"}  # field of a point -> gauge
Show = Callable[[Mapping[str, str], Mapping[str, float]], None]


class Tried(Protocol):
    """What became of the run's groups so far."""

    restarts: int
    resizes: int
    repeated: int


class Vitals:
    """The gauges of meters.RUN for one submission of a run, while it is entered. A thread sets them: they stay while
    the driver waits for nodes."""

    def __init__(self, run: str, plan: Plan, tried: Tried, show: Show | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._labels, self._plan, self._tried = {"run": run}, plan, tried
        self._show, self._clock, self._began = show or metering.show, clock, clock()
        self._goodput: Goodput | None = None  # until a group has said where it begins
        self._workers, self._step = 0, 0
        self._known: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vitals", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def group(self, workers: int) -> Iterator[None]:
        """A group of so many is there meanwhile."""
        self._workers = workers
        try:
            yield
        finally:
            self._workers = 0

    def hear(self, records: Sequence[Record]) -> None:
        """Records of workers, in their order."""
        for record in records:
            match record["kind"]:
                case "restored":
                    self._restored(record["global_step"])
                case "at":
                    self._step = max(self._step, record["global_step"])
                case "progress":
                    self._progress(record)
                case "epoch" if "val_top1" in record:
                    self._known = self._known | {"validation_top1_ratio": record["val_top1"]}

    def values(self) -> dict[str, float]:
        """Gauge -> value; what is not known yet is left out."""
        tried, step = self._tried, self._step
        useful = self._goodput.share(self._clock() - self._began) if self._goodput else 0.0
        return {
            "workers": self._workers,
            "restarts": tried.restarts,
            "resizes": tried.resizes,
            "steps_repeated": tried.repeated,
            "goodput_ratio": useful,
            "steps_done": step,
            "steps_planned": self._plan.steps,
            "epochs_done": step / self._plan.steps_per_epoch,
            **self._known,
        }

    def _restored(self, step: int) -> None:
        self._step, self._goodput = step, self._goodput or Goodput(step)
        self._goodput.restored(step)

    def _progress(self, record: Record) -> None:
        step = record["global_step"]
        if self._goodput:
            seconds = (step - self._goodput.step) * record["step_s"]
            self._goodput.trained(step, seconds * (1 - record["data_wait"]))
        self._step = max(self._step, step)
        self._known = self._known | {gauge: record[field] for field, gauge in SHOWN.items()}

    def _run(self) -> None:
        while True:
            self._show(self._labels, self.values())
            if self._ended.wait(EVERY_S):
                return
