"""What one worker has done and what it took, told to its context now and then: 0.1 us a step."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from orchestrator.context import Context
from orchestrator.training.loop import StepDone

TELL_S = 2.0  # of training between two words: Ray itself passes them on every 10 s
Totals = Mapping[str, int]


class Odometer:
    """Counts for the counters of meters.WORKER, from one thread.

    run: what they are called after. images: of one step, on this rank. fed: totals of what brings the data, read when
    the context is told.
    """

    def __init__(self, context: Context, run: str, images: int, fed: Callable[[], Totals]) -> None:
        self._context, self._run, self._images, self._fed = context, run, images, fed
        self._steps = self._bad = 0
        self._step_s = self._wait_s = 0.0
        self._other_s = _others()
        self._seen: Totals = {}
        self.tell()  # all counters are there from the start, also those that nothing comes to

    def add(self, done: StepDone) -> None:
        """One step."""
        self._steps += 1
        self._bad += len(done.bad)
        self._step_s += done.step_s
        self._wait_s += done.wait_s
        if self._step_s + self._wait_s >= TELL_S:
            self.tell()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Counts the seconds inside, as `<name>_seconds_total`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._other_s[f"{name}_seconds_total"] += time.perf_counter() - began

    def tell(self) -> None:
        """Tells the context what came since the last time."""
        fed = self._fed()
        amounts = {
            "images_total": self._steps * self._images,
            "steps_total": self._steps,
            "step_seconds_total": self._step_s,
            "data_wait_seconds_total": self._wait_s,
            "bad_images_total": self._bad,
            **self._other_s,
            **{name: total - self._seen.get(name, 0) for name, total in fed.items()},
        }
        self._steps = self._bad = 0
        self._step_s = self._wait_s = 0.0
        self._other_s, self._seen = _others(), fed
        self._context.count(self._run, amounts)


def _others() -> dict[str, float]:
    """Seconds of what is timed."""
    return {"evaluation_seconds_total": 0.0, "checkpoint_seconds_total": 0.0}
