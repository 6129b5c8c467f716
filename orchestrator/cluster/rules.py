"""The door to Ray Tune's stopping rules: its own objects, told reports without a Tune run around them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import count, takewhile
from math import ceil, inf, isfinite

import numpy as np
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.sweep.rules import shown
from orchestrator.sweep.trial import METRICS

# The score of what is no finite number: below all others, and finite itself, or Tune's percentiles would be NaN.
WORST = -1e30
SHARES: dict[float, str] = {2: "half", 3: "third", 4: "quarter", 5: "fifth"}


@dataclass(frozen=True)
class Named:
    """All that Tune's rules ask of a trial."""

    trial_id: str


class TuneRule(ABC):
    """A rule of Tune's that hears each report once, and of a trial that it has stopped only the end."""

    def __init__(self, scheduler: FIFOScheduler, metric: str) -> None:
        self._scheduler, self._metric = scheduler, metric
        self._answers: dict[str, dict[int, str | None]] = {}  # trial -> samples -> what was said

    def hear(self, trial_id: str, samples: int, score: float, last: bool = False) -> str | None:
        """See Rule.hear. A report with fewer samples than one before it is passed over."""
        trial = Named(trial_id)
        if trial_id not in self._answers:
            self._scheduler.on_trial_add(None, trial)
        answers = self._answers.setdefault(trial_id, {})
        if samples in answers or samples < max(answers, default=0):
            return answers.get(samples)
        answers[samples] = self._ask(trial, samples, score if isfinite(score) else WORST, last, answers)
        return answers[samples]

    def _ask(self, trial: Named, samples: int, score: float, last: bool, answers: dict[int, str | None]) -> str | None:
        report = {"samples": samples, "score": score}
        if last:
            return self._scheduler.on_trial_complete(None, trial, report)
        if stopped := next(filter(None, answers.values()), None):
            return stopped  # it was asked to stop, and goes on to the end of its epoch
        before = self._others(trial, samples)
        if self._scheduler.on_trial_result(None, trial, report) != TrialScheduler.STOP:
            return None
        return self._sentence(trial, samples, score, before)

    @abstractmethod
    def _others(self, trial: Named, samples: int) -> list[float]:
        """The scores that a trial with so many samples is compared with."""

    @abstractmethod
    def _sentence(self, trial: Named, samples: int, score: float, others: list[float]) -> str:
        """Why it stops."""

    def _compared(self, best: str, score: float, samples: int, bar: float, what: str) -> str:
        if score == WORST:
            return f"{self._metric} is no finite number after {samples:,} images"
        side = "below" if METRICS[self._metric] else "above"
        own, other = shown(self._metric, score), shown(self._metric, bar)
        return f"{self._metric} {own}{best} after {samples:,} images is {side} {other}, {what}"


class Asha(TuneRule):
    """Asynchronous successive halving (Li et al. 2020), in the form that stops: at each rung a trial is asked once.

    It goes on where it is not below the 1 - 1 / factor percentile of those that came to the rung before it, with
    linear interpolation; the first at a rung always goes on. The paper's form lets trials wait at a rung until enough
    others have come, and promotes them; here nobody waits.

    grace: samples at the first rung; factor: between rungs, and of `factor` trials about one goes on; end: samples at
    which the sweep's longest trial ends. A trial counts at a rung with its first report at or beyond it.
    """

    def __init__(self, metric: str, grace: int, factor: float, end: int) -> None:
        self._grace, self._factor, self._end = grace, factor, end
        self._scheduler: ASHAScheduler
        # A last report is told as such. Tune's own end would let a report beyond all rungs count at lower ones again.
        super().__init__(
            ASHAScheduler(
                "samples", "score", "max", max_t=max(end, grace), grace_period=grace, reduction_factor=factor,
                stop_last_trials=False,
            ), metric)  # fmt: skip

    def rungs(self) -> list[int]:
        """Below the end: there nobody is stopped."""
        all_rungs = (ceil(self._grace * self._factor**k) for k in count())
        return list(takewhile(lambda rung: rung < self._end, all_rungs))

    def hear(self, trial_id: str, samples: int, score: float, last: bool = False) -> str | None:
        """See Rule.hear; whoever is at the sweep's end has ended, whatever is said of it."""
        return super().hear(trial_id, samples, score, last or samples >= self._end)

    def _others(self, trial: Named, samples: int) -> list[float]:
        """Tune has no public way to them."""
        reached = (recorded for rung, recorded in self._scheduler._brackets[0]._rungs if rung <= samples)
        return list(next(reached, {}).values())

    def _sentence(self, trial: Named, samples: int, score: float, others: list[float]) -> str:
        bar = float(np.percentile(others, 100 * (1 - 1 / self._factor)))
        share = SHARES.get(self._factor, f"1/{self._factor:g}")
        trials = "1 trial" if len(others) == 1 else f"{len(others)} trials"
        return "asha: " + self._compared("", score, samples, bar, f"the best {share} of {trials} there")


class Median(TuneRule):
    """The median rule (Golovin et al. 2017): whose best score is below the median of the others' averages stops.

    Averages are over the reports from `grace` samples on until the trial's own number; others are those that have come
    as far, and at least `least` of them are needed.
    """

    def __init__(self, metric: str, grace: int, least: int = 3) -> None:
        # An endless slice: Tune would pause a trial that cannot be compared yet, in favour of those that wait.
        self._scheduler: MedianStoppingRule
        super().__init__(
            MedianStoppingRule(
                "samples", "score", "max", grace_period=grace, min_samples_required=least, min_time_slice=inf,
                hard_stop=True,
            ), metric)  # fmt: skip

    def rungs(self) -> list[int]:
        """Every report may end a trial."""
        return []

    def _others(self, trial: Named, samples: int) -> list[float]:
        """Tune has no public way to them."""
        others = [other for other in self._scheduler._trials_beyond_time(samples) if other != trial]
        return [mean for other in others if isfinite(mean := self._scheduler._running_mean(other, samples))]

    def _sentence(self, trial: Named, samples: int, score: float, others: list[float]) -> str:
        best, bar = self._scheduler._best_result(trial), float(np.median(others))
        trials = f"the median of {len(others)} trials' averages until there"
        return "median: " + self._compared(" at best", best, samples, bar, trials)
