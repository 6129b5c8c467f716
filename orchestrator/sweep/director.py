"""Which trial starts, goes on, stops: what the sweep's driver decides, and keeps in the journal before it acts.

A report is written before it counts, so whoever takes the sweep up knows the same and decides the same.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.cluster.places import Places
from orchestrator.cluster.trials import Assignment
from orchestrator.context import Record
from orchestrator.state.records import Result, read_result
from orchestrator.state.storage import Storage
from orchestrator.stop import Stop
from orchestrator.sweep.births import Births
from orchestrator.sweep.fates import Fate, fates
from orchestrator.sweep.journal import Journal
from orchestrator.sweep.outcome import after, metrics
from orchestrator.sweep.rules import NoRule, Rule, replay
from orchestrator.sweep.search import Search
from orchestrator.sweep.training import ended
from orchestrator.sweep.trial import Report, Trial, signed
from orchestrator.sweep.tries import TRIES, Tries
from pipelines.errors import ConfigError, DataError

SILENT_S = 30.0  # that a slot may take to start before it is said
BIRTH = ""  # a trial to be
Say = Callable[[str], None]


class SweepDirector:
    """Decides for the trials of one submission; see cluster.trials.Director.

    rule: makes the stopping rule. One with rungs decides between a trial's parts, one without asks for an end while it
    trains. ask: tells a trial to save a checkpoint and end. limit: failed trials that may be; None = any number.
    wait_s: how long nothing may fit before the sweep ends, to be gone on with.

    A trial fails by what it does, or when its driver dies TRIES times in a row. For want of the cluster none fails.
    """

    def __init__(
        self, births: Births, search: Search, rule: Callable[[], Rule], metric: str, journal: Journal, places: Places,
        ask: Callable[[str, str], None], say: Say, changed: Callable[[Sequence[Trial]], None], stop: Stop,
        limit: int | None = None, concurrent: int = 0, wait_s: float = 60.0,
    ) -> None:  # fmt: skip
        self._births, self._search, self._metric = births, search, metric
        self._fated = rule if rule().rungs() else NoRule
        self._live = NoRule() if rule().rungs() else rule()
        self._journal, self._places, self._ask = journal, places, ask
        self._say, self._changed, self._stop, self._limit = say, changed, stop, limit
        self._concurrent = concurrent
        self._trials = journal.trials()
        self._order = sum(len(trial.reports) for trial in self._trials.values())
        self._active: dict[str, float] = {}  # trial -> when it started, earlier parts included
        self._silent: dict[str, float] = {}  # trial whose slot has not spoken yet -> when it was given one
        self._asked: set[str] = set()  # trials that were asked to end
        self._ruled: dict[str, str] = {}  # those that the rule ended -> why
        self._tries = Tries(say, wait_s)
        self._stop_all(replay(self._live, self.trials, metric))
        self._fates = self._decide()

    @property
    def trials(self) -> list[Trial]:
        """All that were born."""
        return list(self._trials.values())

    @property
    def total(self) -> int:
        """Trials in all."""
        return self._search.total

    @property
    def failed(self) -> int:
        """Trials that failed."""
        return sum(trial.state == "failed" for trial in self.trials)

    @property
    def lacks(self) -> str | None:
        """What the cluster has not had for so long that the sweep ends."""
        return self._tries.lacks

    @property
    def gives_up(self) -> bool:
        """Whether too many failed."""
        return self._limit is not None and self.failed > self._limit

    # -- cluster.trials.Director -----------------------------------------------------------------------------------

    def next(self) -> Assignment | None:
        """The first trial that has not ended and does not run, or a new one; None while none can start."""
        self._say_silent()
        if self._ending or 0 < self._concurrent <= len(self._active):
            return None
        trial = self._ready() or self._bear()
        if trial is None or trial.over:
            return None
        workers = self._places.take(trial.id, trial.workers)
        if workers is None:
            self._wait_for_places(trial)
            return None
        self._tries.fits()
        what = self._work(trial, workers)
        if what is None:
            self._places.give(trial.id)
            return None
        self._silent[trial.id] = now = time.monotonic()
        self._active[trial.id] = now - (trial.reports[-1].seconds if trial.reports else 0.0)
        self._put(replace(trial, state="running", reason=None))
        self._changed(self.trials)
        return Assignment(trial.id, what)

    def over(self) -> bool:
        """Whether all trials were born and have ended, or no more shall start."""
        born = len(self._trials) >= self._search.total and all(trial.over for trial in self.trials)
        return not self._active and (born or self._ending)

    def abandons(self) -> bool:
        """Whether the sweep ends, and what was not given a slot yet is not waited for."""
        return self._ending and self._active.keys() <= self._silent.keys()

    def heard(self, id: str, news: Sequence[Record]) -> None:
        """Reports count; what is said is passed on."""
        self._silent.pop(id, None)
        for record in news:
            if record["kind"] == "said":
                self._say(f"{id}: {record['text']}")
            elif record["kind"] in ("epoch", "recalled"):
                self._report(id, record)
        if self._ending:
            self._ask_for_end(id, self._stop.why or self.lacks or "too many trials failed")
        self._changed(self.trials)

    def ended(self, id: str, outcome: dict[str, Any]) -> None:
        """By itself, or because it was asked to."""
        self._take_in(id, outcome)
        for known in (self._active, self._silent, self._ruled):
            known.pop(id, None)
        self._places.give(id)
        self._asked.discard(id)
        self._fates = self._decide()
        self._changed(self.trials)

    def died(self, id: str, why: str) -> None:
        """Its driver did; its run goes on from its checkpoint with another one."""
        self.ended(id, {"state": "died", "reason": f"the trial's driver died: {why}"})

    def leave(self) -> None:
        """The sweep ends: what still has no slot waits for the next submission."""
        for id in list(self._active):
            self.ended(id, {"state": "stopped", "reason": None})

    # -- births ----------------------------------------------------------------------------------------------------

    @property
    def _ending(self) -> bool:
        return self._stop.asked() or self.gives_up or self.lacks is not None

    def _ready(self) -> Trial | None:
        """The first, by birth, that may train on now and does not."""
        idle = (trial for trial in self.trials if not trial.over and trial.id not in self._active)
        ready = (trial for trial in idle if self._fates[trial.id].until)
        return next((trial for trial in ready if self._tries.may(trial.id)), None)

    def _bear(self) -> Trial | None:
        """A new trial, if there is to be one now."""
        if len(self._trials) >= self._search.total or self._places.take(BIRTH, "1") is None:
            return None
        self._places.give(BIRTH)
        draw = self._search.next(self.trials)
        if draw is None:
            return None
        trial = self._births.bear(len(self._trials) + 1, draw)
        self._put(trial)
        self._fates = self._decide()
        return trial

    def _work(self, trial: Trial, workers: str) -> str | None:
        """What its slot is to do; None where that is done already, or cannot be."""
        try:
            return None if self._ended_before(trial) else self._births.task(trial, self._until(trial), workers)
        except (ConfigError, DataError) as error:  # what it takes up is gone
            self._settle(replace(trial, state="failed", reason=str(error)))
            self._fates = self._decide()
            return None

    def _ended_before(self, trial: Trial) -> bool:
        """Whether its run had come so far when its driver, or the sweep's, died: what it said last is taken in."""
        result = self._result(trial)
        if result is None or result.status not in ("finished", "stopped") or result.epochs < self._until(trial):
            return False
        self._take_in(trial.id, ended(result))
        self._fates = self._decide()
        return self._trials[trial.id].over or self._trials[trial.id].epoch > trial.epoch

    def _until(self, trial: Trial) -> int:
        return self._fates[trial.id].until

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _wait_for_places(self, trial: Trial) -> None:
        if not self._active:
            total = self._places.total
            self._tries.nothing_fits(f"{trial.id} needs {trial.workers} workers, the cluster has room for {total}")

    def _say_silent(self) -> None:
        for id, since in self._silent.items():
            if time.monotonic() - since > SILENT_S:
                self._tries.say_once(f"{id} waits for its driver to start, most likely for free memory on a node")

    # -- reports ---------------------------------------------------------------------------------------------------

    def _report(self, id: str, record: Mapping[str, Any]) -> None:
        """An epoch of a trial, once; what a trial says after the rule has ended it does not count."""
        trial = self._trials[id]
        if id in self._ruled or (values := metrics(trial, record, self._metric)) is None:
            return
        epoch, now = int(record["epoch"]), time.monotonic()
        samples = epoch * self._births.epoch_samples(trial)
        report = Report(self._order, epoch, samples, values, now - self._active.get(id, now))
        self._order += 1
        self._tries.progress(id)
        self._put(replace(trial, reports=(*trial.reports, report), failures=0))
        score, last = signed(self._metric, values[self._metric]), epoch >= (trial.stop_after or trial.epochs)
        if why := self._live.hear(id, samples, score, last):
            self._ruled[id] = why
            self._ask_for_end(id, why)

    def _ask_for_end(self, id: str, why: str) -> None:
        if id not in self._asked and id in self._active:
            self._asked.add(id)
            self._ask(id, why)

    def _take_in(self, id: str, outcome: Mapping[str, Any]) -> None:
        """How a trial ended, with what it reported last."""
        for record in outcome.get("curve", []):
            self._report(id, record)
        trial = after(self._trials[id], outcome, self._ruled.get(id))
        if not trial.over and outcome["state"] in ("lacking", "died"):
            trial = self._again(trial, outcome["state"], outcome["reason"])
        self._settle(trial)

    def _again(self, trial: Trial, state: str, why: str) -> Trial:
        """It waits for another try, or has failed with its drivers."""
        if state == "lacking":
            self._tries.lacking(trial.id, why)
            return replace(trial, state="waiting")
        failures = trial.failures + 1
        if failures >= TRIES:
            return replace(trial, state="failed", reason=why, failures=failures)
        self._tries.again(trial.id, failures, why)
        return replace(trial, state="waiting", failures=failures)

    def _decide(self) -> dict[str, Fate]:
        """How far each may train; those that stop do."""
        found = fates(self.trials, self._fated(), self._metric, self._births.epoch_samples)
        self._stop_all({id: fate.why for id, fate in found.items() if fate.why is not None})
        return found

    def _stop_all(self, stopped: Mapping[str, str]) -> None:
        for id, why in stopped.items():
            if not self._trials[id].over and id not in self._active:
                trial = self._trials[id]
                if trial.weights_sha256 is None and (result := self._result(trial)):  # a driver died in between
                    trial = replace(trial, seconds=result.seconds, weights_sha256=result.weights_sha256)
                self._settle(replace(trial, state="stopped", reason=why))

    def _result(self, trial: Trial) -> Result | None:
        """What its run wrote at its end, if it has ended."""
        return read_result(Storage(self._births.folder(trial)))

    def _settle(self, trial: Trial) -> None:
        """As it stands after a part of its training."""
        self._put(trial)
        if trial.over:
            self._say(f"{trial.id} {trial.title} {trial.state}" + (f": {trial.reason}" if trial.reason else ""))
            self._births.close(trial)

    def _put(self, trial: Trial) -> None:
        self._journal.put(trial)
        self._trials[trial.id] = trial
