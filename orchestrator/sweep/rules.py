"""Stopping rules: which trials are not worth their time. Pure; those of Ray Tune stand behind `cluster/rules.py`.

A rule hears reports one by one, in the order in which the sweep's driver heard them, and nothing else: told the same
reports it says the same, so that after a restart it is built anew from the journal.
"""

from collections.abc import Iterable
from typing import Protocol

from orchestrator.sweep.trial import Trial, signed


class Rule(Protocol):
    """Stops poor trials."""

    def hear(self, trial_id: str, samples: int, score: float, last: bool = False) -> str | None:
        """A report: None to go on, or a sentence that says why the trial stops.

        samples: training images that the trial has seen. score: more is better. last: the trial ends here by itself,
        so it counts for the others and is not stopped. A report that was heard before gets the same answer again.
        """

    def rungs(self) -> list[int]:
        """The numbers of samples at which trials may be stopped, rising; empty where it is not at some alone."""


class NoRule:
    """Stops nobody."""

    def hear(self, trial_id: str, samples: int, score: float, last: bool = False) -> str | None:
        """None."""
        return None

    def rungs(self) -> list[int]:
        """None."""
        return []


def replay(rule: Rule, trials: Iterable[Trial], metric: str) -> dict[str, str]:
    """Tells the rule all that was reported, in its order; trial id -> why it stops, for those that do."""
    heard = sorted(((report, trial) for trial in trials for report in trial.reports), key=lambda pair: pair[0].order)
    said = {}
    for report, trial in heard:
        last = report.epoch >= (trial.stop_after or trial.epochs)
        if why := rule.hear(trial.id, report.samples, signed(metric, report.metrics[metric]), last):
            said[trial.id] = why
    return said


def shown(metric: str, score: float) -> str:
    """A score for people: '71.20 %', '2.31'."""
    value = signed(metric, score)
    return f"{100 * value:.2f} %" if "top" in metric else f"{value:.4g}"
