"""When the state is saved: by steps, by the clock, or because the driver asks. All ranks hear it at the same step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag


class Ask(IntFlag):
    """What rank 0 asks all ranks for; it travels with a step's sums."""

    NOTHING = 0
    STOP = 1  # a checkpoint, and an end
    CHECKPOINT = 2  # into the run's storage
    COPY = 4  # into the memory of each node


@dataclass
class Timer:
    """Due once in so many seconds; never where they are 0."""

    seconds: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began = self.clock()

    def due(self) -> bool:
        """Whether it is time; then it begins anew."""
        if not self.seconds or self.clock() - self._began < self.seconds:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """From now on."""
        self._began = self.clock()


class Rhythm:
    """What is due after a step. Rank 0 reads the clock, and what it asks is heard LAG steps later by all."""

    def __init__(
        self, steps: int, checkpoint_s: float, copy_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self.copies = steps, bool(copy_s)
        self._checkpoint, self._copy = Timer(checkpoint_s, clock), Timer(copy_s, clock)

    def ask(self, stop: bool) -> Ask:
        """What rank 0 asks for now; once for each time that is due, `stop` until it is heard."""
        wanted = Ask.STOP if stop else Ask.NOTHING
        if self._checkpoint.due():
            wanted |= Ask.CHECKPOINT
        if self._copy.due():
            wanted |= Ask.COPY
        return wanted

    def after(self, step: int, ends_epoch: bool, asked: int) -> Ask:
        """What is done now that `step` global steps are; the same on all ranks."""
        wanted = Ask(asked)
        if ends_epoch or Ask.STOP in wanted or (self._steps and step % self._steps == 0):
            wanted |= Ask.CHECKPOINT
        if Ask.CHECKPOINT in wanted:  # goes into memory as well
            self._checkpoint.restart()
            self._copy.restart()
        return wanted
