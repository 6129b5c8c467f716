"""How much of a run's time was of use: seconds in steps that nobody had to do again."""

from bisect import bisect_right


class Goodput:
    """Seconds in steps, over the steps that they led to; what is done again is taken back.

        heard                        seconds
        trained(10, 5.0)             5.0      ten steps
        trained(20, 5.0)             10.0
        restored(16)                 8.0      the last four are done again
        trained(20, 3.0)             11.0
        restored(24)                 11.0     four were done that nobody heard of: their seconds are not known
        trained(30, 3.0)             14.0

    start: the step that the run is at.
    """

    def __init__(self, start: int = 0) -> None:
        self._steps, self._seconds = [start], [0.0]  # a curve: seconds that led to a step, straight in between

    @property
    def step(self) -> int:
        """The last one that was heard of."""
        return self._steps[-1]

    @property
    def seconds(self) -> float:
        """Of use so far."""
        return self._seconds[-1]

    def trained(self, step: int, seconds: float) -> None:
        """Since the last call the run came to this step, in so many seconds."""
        self._steps.append(step)
        self._seconds.append(self.seconds + seconds)

    def restored(self, step: int) -> None:
        """The run goes on from this step."""
        until = self._until(step)
        kept = bisect_right(self._steps, step)
        self._steps[kept:], self._seconds[kept:] = [step], [until]

    def share(self, wall_s: float) -> float:
        """Of so many seconds: 0..1."""
        return min(self.seconds / wall_s, 1.0) if wall_s > 0 else 0.0

    def _until(self, step: int) -> float:
        """Seconds of use that led to a step."""
        after = bisect_right(self._steps, step)
        if after == len(self._steps):
            return self.seconds
        if after == 0:
            return 0.0
        (a, b), (low, high) = self._steps[after - 1 : after + 1], self._seconds[after - 1 : after + 1]
        return low + (high - low) * (step - a) / (b - a)
