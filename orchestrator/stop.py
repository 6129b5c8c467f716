"""The wish for an end: a signal's, or of whoever runs the run."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Who asked for an end; `why` is None while nobody did."""

    why: str | None = None
    signum: int | None = None  # where it was a signal

    def __call__(self, signum: int, _: FrameType | None) -> None:
        """The handler: a second signal ends the process at once."""
        if self.signum is not None:
            raise KeyboardInterrupt
        self.why, self.signum = signal.Signals(signum).name, signum

    def ask(self, why: str) -> None:
        """From any thread; the first one counts."""
        self.why = self.why or why

    def asked(self) -> bool:
        """Whether anybody did."""
        return self.why is not None


@contextmanager
def heeding_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask for an end, while this lasts. Python allows it in the main thread alone."""
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
