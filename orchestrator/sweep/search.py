"""Which trial comes next. A search keeps nothing: what it says follows from the trials that there are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.runs import known_points
from orchestrator.sweep.space import Point, Space
from orchestrator.sweep.trial import Fork, Trial


@dataclass(frozen=True)
class Draw:
    """A trial to be born."""

    point: Point
    fork: Fork | None = None
    stop_after: int = 0


class Search(Protocol):
    """Draws trials, one after the other."""

    total: int  # trials that it draws in all

    def next(self, trials: Sequence[Trial]) -> Draw | None:
        """The trial after `trials`, which are all so far; None where that depends on some that have not ended."""


class Listed:
    """Points that are known from the beginning: a grid, or a random search."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points, self.total = points, len(points)

    def next(self, trials: Sequence[Trial]) -> Draw:
        """By number."""
        return Draw(self._points[len(trials)])


class Tpe:
    """Tree-structured Parzen estimators: what was learned from the trials so far says where the next one is."""

    def __init__(self, space: Space, sweep: SweepConfig) -> None:
        self._space, self._sweep, self.total = space, sweep, sweep.trials

    def next(self, trials: Sequence[Trial]) -> Draw:
        """From the scores of those that have ended, and the places of those that run."""
        from orchestrator.cluster import tpe

        known = [(trial.config, self._score(trial)) for trial in trials]
        return Draw(tpe.suggest(self._space, known, self._sweep.seed, len(trials)))

    def _score(self, trial: Trial) -> float | None:
        """None while it runs; a trial that failed is the worst there can be."""
        if not trial.over:
            return None
        score = trial.score(self._sweep.metric)
        return -math.inf if score is None or trial.state == "failed" else score


def open_search(space: Space, sweep: SweepConfig, epochs: int) -> Search:
    """The search that sweep.search names. epochs: of a trial."""
    if sweep.search == "tpe":
        return Tpe(space, sweep)
    if sweep.search == "pbt":
        from orchestrator.sweep.pbt import Pbt

        return Pbt(space, sweep, epochs)
    return Listed(known_points(space, sweep))
