"""The door to Optuna, through Ray Tune's searcher: where the next trial should look, from those that there are.

Nothing is kept: each time a fresh searcher is told all trials and asked once. That costs milliseconds a trial, and a
sweep's driver that starts again asks the same and gets the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import optuna
from ray.tune.search.optuna import OptunaSearch

from orchestrator.sweep.space import Point, Range, Space, Value, Values, draws
from pipelines.errors import ConfigError

RANDOM = 5  # trials with a result before any is learned from; Optuna's own 10 are most of a small sweep
ASKS = 50  # for a point that was not tried yet
SUGGEST = 3  # purpose of random numbers
Part = Values | Range
optuna.logging.set_verbosity(optuna.logging.WARNING)  # it says that a study was created, each time


def suggest(space: Space, known: Sequence[tuple[Point, float | None]], seed: int, number: int) -> Point:
    """The point of trial `number`, one that is not among those known: tree-structured Parzen estimators.

    known: the trials so far, in their order, with their scores (more is better); None while one runs: it counts as
    poor where it is, so that others look elsewhere. A score that is no finite number, of a trial that failed, is worse
    than all others: a rate that diverges is learned from. Raises ConfigError where no point is left.
    """
    searcher = OptunaSearch(
        lambda trial: _walk(space, _asking(trial)),
        "score",
        "max",
        points_to_evaluate=[_parameters(space, point) for point, _ in known],
        sampler=optuna.samplers.TPESampler(seed=_seed(seed, number), n_startup_trials=RANDOM),
    )
    names = [str(i) for i in range(len(known))]
    for name in names:  # before any is scored: what Optuna would say of them is not wanted
        searcher.suggest(name)
    for name, (_, score) in zip(names, known, strict=True):
        if score is not None:  # without a result a trial is "pruned", which TPE ranks last; failed ones it forgets
            searcher.on_trial_complete(name, {"score": score} if math.isfinite(score) else None)
    tried = [point for point, _ in known]
    found = next((point for point in _offers(space, searcher, seed, len(known)) if point not in tried), None)
    if found is None:
        raise ConfigError(f"the space has no point that was not tried; {len(known)} trials are all it has room for")
    return found


def _offers(space: Space, searcher: OptunaSearch, seed: int, count: int) -> Iterator[Point]:
    """What TPE suggests, as long as it is worth asking; then random points, more than there are trials."""
    for i in range(ASKS):
        said = searcher.suggest(f"new {i}")
        yield {name: said[name] for name in space.dimensions}
    yield from draws(space, seed, count + 1)


def _walk(space: Space, value: Callable[[str, Part], Value]) -> Point:
    """The point that `value` makes, dimension after dimension."""
    point: Point = {}
    for name in space.dimensions:
        point[name] = value(_key(space, name, point), space.at(name, point))
    return point


def _key(space: Space, name: str, point: Point) -> str:
    """The parameter's name: a list or range for each case is another parameter for Optuna."""
    return f"{name} {space.parts(name).index(space.at(name, point))}"


def _asking(trial: optuna.Trial) -> Callable[[str, Part], Value]:
    """Values that Optuna chooses. Of a list it chooses the place, whatever stands there."""

    def ask(key: str, part: Part) -> Value:
        if isinstance(part, Values):
            return part.values[trial.suggest_categorical(key, range(len(part.values)))]
        if part.whole:
            return trial.suggest_int(key, int(part.low), int(part.high), log=part.log)
        return part.inside(trial.suggest_float(key, part.low, part.high, log=part.log))

    return ask


def _parameters(space: Space, point: Point) -> dict[str, Any]:
    """A point as Optuna has it."""
    said: dict[str, Any] = {}
    for name in space.dimensions:
        part = space.at(name, point)
        value = part.values.index(point[name]) if isinstance(part, Values) else point[name]
        said[_key(space, name, point)] = value
    return said


def _seed(seed: int, number: int) -> int:
    """Of the trial alone: what was asked before does not matter."""
    return int(np.random.Philox(key=[seed, SUGGEST], counter=[0, number, 0, 0]).random_raw() >> 32)
