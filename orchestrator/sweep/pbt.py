"""Population based training (Jaderberg et al. 2017), in generations: what is learned is a rate that changes.

A population trains for an interval. Then each of the worst quarter goes on with the state and the settings of one of
the best quarter, one of them changed; the others go on as they are. Each member's part of an interval is a trial of
its own, which forks from the trial before it. Pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.sweep.config import SweepConfig, changing
from orchestrator.sweep.runs import known_points
from orchestrator.sweep.search import Draw
from orchestrator.sweep.space import Point, Range, Space, Value
from orchestrator.sweep.trial import Fork, Trial

FACTORS = (1.2, 0.8)
ANEW = 0.25  # how often a value is drawn anew instead
PERTURB = 4  # purpose of random numbers


@dataclass(frozen=True)
class Member:
    """One of a population, at the end of an interval."""

    trial: str
    point: Point
    score: float | None  # more is better; None where it failed


class Pbt:
    """The search that draws a population's trials, generation after generation."""

    def __init__(self, space: Space, sweep: SweepConfig, epochs: int) -> None:
        self._space, self._sweep, self._epochs = space, sweep, epochs
        self._first = known_points(space, sweep)
        self.total = len(self._first) * generations(epochs, sweep.interval)

    def next(self, trials: Sequence[Trial]) -> Draw | None:
        """The trial after `trials`; None until the generation before has ended. Where all of it failed none follows."""
        sweep, size = self._sweep, len(self._first)
        generation, number = divmod(len(trials), size)
        if generation == 0:
            return Draw(self._first[number], stop_after=stop_after(0, sweep.interval, self._epochs))
        before = trials[(generation - 1) * size : generation * size]
        if not all(trial.over for trial in before):
            return None
        members = [Member(trial.id, trial.config, self._score(trial)) for trial in before]
        draws = next_generation(members, generation, sweep.interval, self._epochs, self._space, sweep.seed)
        if not draws:
            self.total = len(trials)
            return None
        return draws[number]

    def _score(self, trial: Trial) -> float | None:
        return None if trial.state == "failed" else trial.score(self._sweep.metric)


def generations(epochs: int, interval: int) -> int:
    """How many a sweep of so many epochs has; the last one may be shorter."""
    return -(-epochs // interval)


def stop_after(generation: int, interval: int, epochs: int) -> int:
    """Epochs after which the trials of a generation (from 0) stop; 0 where that is their schedule's end."""
    end = (generation + 1) * interval
    return end if end < epochs else 0


def lineage(trials: Sequence[Trial], id: str) -> list[Trial]:
    """What a trial's weights went through, from its beginning: it is last, and each forks from the one before it."""
    known, line = {trial.id: trial for trial in trials}, [id]
    while fork := known[line[0]].fork:
        line.insert(0, fork.trial)
    return [known[name] for name in line]


def next_generation(
    members: Sequence[Member], generation: int, interval: int, epochs: int, space: Space, seed: int
) -> list[Draw]:
    """The trials of `generation` (from 1), a member each, in the order of `members`: those of the one before.

    The worst quarter, and all that have no finite score, are replaced; with two members or more it is at least one. An
    empty list where nobody has a finite score: there is nothing to go on from.
    """
    scores = {i: m.score for i, m in enumerate(members) if m.score is not None and math.isfinite(m.score)}
    well = sorted(scores, key=lambda i: -scores[i])  # stable: of equal ones the first is the better one
    if not well:
        return []
    order = well + [i for i in range(len(members)) if i not in scores]
    quarter = max(len(members) // 4, 1)
    poor = {*order[max(len(order) - quarter, 1) :], *order[len(well) :]}
    epoch, stop = generation * interval, stop_after(generation, interval, epochs)
    drawn = []
    for i, member in enumerate(members):
        random = _shares(seed, generation, i)
        source = members[well[int(random[0] * min(quarter, len(well)))]] if i in poor else member
        point = _changed(source.point, space, random[1:]) if i in poor else source.point
        drawn.append(Draw(dict(point), Fork(source.trial, epoch), stop))
    return drawn


def _changed(point: Point, space: Space, random: Sequence[float]) -> Point:
    """The point with another value of the one setting that may change."""
    name = changing(space)
    part = space.at(name, point)
    assert isinstance(part, Range)
    return point | {name: _perturbed(part, point[name], random)}


def _perturbed(part: Range, value: float, random: Sequence[float]) -> Value:
    """A factor up or down, or a value drawn anew; at an end of the range the other factor, or two would be the same."""
    anew, up, share = random
    if anew < ANEW:
        return part.draw(share)
    factors = FACTORS if up < 0.5 else FACTORS[::-1]
    moved = (part.inside(value * factor) for factor in factors)
    return next((other for other in moved if other != value), part.draw(share))


def _shares(seed: int, generation: int, member: int) -> list[float]:
    """Four numbers, 0 <= x < 1, of this member alone."""
    random = np.random.Philox(key=[seed, PERTURB], counter=[0, generation, member, 0])
    return ((random.random_raw(4) >> np.uint64(11)) * 2.0**-53).tolist()
