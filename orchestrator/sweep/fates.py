"""How far each trial may train now: to its next rung, and beyond it once those born before it have come there. Pure.

At a rung a trial is compared with those born before it, whichever came first. So which trials stop, and where, follows
from the space and the seed alone: not from how fast the machines are, how many trials run at once, or what died. Who
has to wait is paused, and costs nothing: a run is taken up exactly where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from orchestrator.sweep.rules import Rule
from orchestrator.sweep.trial import Trial, signed


@dataclass(frozen=True)
class Fate:
    """Of a trial that is not over."""

    until: int = 0  # epochs that it may train to; 0 = not now: it is to be compared with trials that are not there yet
    why: str | None = None  # it stops


def fates(trials: Sequence[Trial], rule: Rule, metric: str, epoch_samples: Callable[[Trial], int]) -> dict[str, Fate]:
    """trials: all that were born, by birth. rule: a fresh one. epoch_samples: training images of a trial's epoch."""
    found, rungs = dict[str, Fate](), rule.rungs()
    reached = inf  # the rung, in samples, that all trials so far have come to
    for trial in trials:
        if trial.over and not trial.reports:
            continue
        fate = _fate(trial, rule, rungs, metric, epoch_samples(trial), reached)
        if not trial.over:
            found[trial.id] = fate
            if not fate.why:
                reached = min(reached, max((rung for rung in rungs if rung <= _samples(trial)), default=0))
    return found


def _fate(trial: Trial, rule: Rule, rungs: Sequence[int], metric: str, each: int, reached: float) -> Fate:
    """reached: the rung that all born before have come to."""
    end, heard = trial.stop_after or trial.epochs, 0
    for report in trial.reports:
        rung = max((rung for rung in rungs if rung <= report.samples), default=0)
        if rung == heard and report.epoch < end:
            continue  # between rungs nothing is decided
        if not trial.over and rung > reached and report.epoch < end:
            return Fate()
        heard = rung
        score = signed(metric, report.metrics[metric])
        if why := rule.hear(trial.id, report.samples, score, last=report.epoch >= end):
            return Fate(why=why)
    ahead = (-(-rung // each) for rung in rungs if rung > _samples(trial))
    return Fate(until=min([end, *ahead]))


def _samples(trial: Trial) -> int:
    return trial.reports[-1].samples if trial.reports else 0
