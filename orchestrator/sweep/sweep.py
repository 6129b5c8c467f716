"""The life of a sweep: check, open, run its trials, answer. The same name goes on with the same sweep."""

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from orchestrator import provenance, supervise
from orchestrator.cluster.places import Places
from orchestrator.cluster.scaling import await_nodes
from orchestrator.cluster.session import session
from orchestrator.cluster.trials import Trials, check_room
from orchestrator.config import ClusterConfig, RunConfig, flatten, identity_difference
from orchestrator.plan import counts_of
from orchestrator.state.lease import lease
from orchestrator.state.storage import Storage
from orchestrator.stop import Stop, heeding_signals
from orchestrator.sweep import ranking, table
from orchestrator.sweep.answer import Answer, answer, say_answer, track
from orchestrator.sweep.births import Births, samples_span
from orchestrator.sweep.config import SweepConfig, difference, identity
from orchestrator.sweep.director import SweepDirector
from orchestrator.sweep.journal import Journal, SweepRecord
from orchestrator.sweep.outlook import planned
from orchestrator.sweep.rules import NoRule, Rule
from orchestrator.sweep.runs import groups
from orchestrator.sweep.search import open_search
from orchestrator.sweep.space import Space
from orchestrator.sweep.training import train
from orchestrator.sweep.trial import METRICS, Trial
from orchestrator.tracking import (
    NullTracker,
    Others,
    Place,
    Shipped,
    Tracker,
    left_line,
    look_for_server,
    open_tracker,
    run_id_of,
    sweep_view,
)
from pipelines.errors import ClusterError, ConfigError, SkiplaneError, TrainingError

# What a run may change between submissions, and a sweep may not: trials are compared by them.
COMPARED = ("train.epochs", "train.eval_epochs")
TABLE_S = 30.0  # between two tables
Say = Callable[[str], None]
Command = Callable[[Trial, RunConfig], str]  # what trains a trial by itself; its run's settings


def run(config: RunConfig, sweep: SweepConfig, space: Space, *, say: Say, command: Command) -> Answer:
    """Runs the sweep from wherever it is to its end; at once where it has ended before.

    config: what all trials have in common; its name is the sweep's. command: what trains a trial by itself.
    Raises supervise.Stopped after a signal, TrainingError after too many failures, and the SkiplaneError that ended it
    otherwise; the same command goes on.
    """
    return _Sweep(config, sweep, space, say, command).live()


class _Sweep:
    """One submission of one sweep."""

    def __init__(self, config: RunConfig, sweep: SweepConfig, space: Space, say: Say, command: Command) -> None:
        self.config, self.sweep, self.space, self.say, self.command = config, sweep, space, say, command
        self.dataset = supervise.open_checked(config)
        self.counts = counts_of(self.dataset)
        planned(config, sweep, space, self.counts)  # batches and warm-ups that do not fit this data are refused now
        self.storage = Storage(config.folder())
        self.journal = Journal(self.storage)
        self.stop = Stop()
        self.tracker: Tracker = NullTracker()
        self._told = 0.0

    def live(self) -> Answer:
        """See run."""
        record = self._admit()
        if record is not None and (done := self._done()):
            return done
        look_for_server(self.storage, self.config.tracking.uri)
        cores = max(self.config.cluster.cpus, os.cpu_count() or 1)
        with session(cores, self.say), heeding_signals(self.stop):  # in this order: ray.init takes SIGTERM
            self._check_places()
            with lease(self.storage, self.config.name, self.say) as self.held:
                return self._run(self._admit())

    # -- before it starts ------------------------------------------------------------------------------------------

    def _admit(self) -> SweepRecord | None:
        """The sweep that goes on; None for a new one. Raises ConfigError where the name is something else's."""
        for name, kind in (("run.json", "run"), ("study.json", "study")):
            if self.storage.read(name) is not None:
                raise ConfigError(f"name '{self.config.name}' is a {kind} in {self.storage.place}; use another --name")
        record = self.journal.record()
        if record is None:
            return None
        differences = difference(record.identity, identity(self.space, self.sweep))
        differences += identity_difference(record.settings, self.config)
        differences += [
            f"{name} was {record.settings[name]}, is {value}"
            for name, value in flatten(self.config).items()
            if name in COMPARED and record.settings[name] != value and not any(name in line for line in differences)
        ]
        if record.dataset_digest != self.dataset.digest:
            differences.append(f"the dataset's digest was {record.dataset_digest[:12]}, is {self.dataset.digest[:12]}")
        if differences:
            raise ConfigError(
                f"name '{self.config.name}' belongs to another sweep in {self.storage.place}: "
                f"{'; '.join(differences)}; use those settings again, or another --name"
            )
        return record

    def _done(self) -> Answer | None:
        """The answer that there is already."""
        data = self.storage.read("result.json")
        try:
            found = Answer(**json.loads(data or b"null"))
        except (ValueError, TypeError):
            return None
        if found.status != "finished":
            return None
        self.say(f"sweep {found.name} is finished; another --name searches anew")
        say_answer(found, list(self.journal.trials().values()), list(self.space.dimensions), self.say)
        return found

    def _check_places(self) -> None:
        """Raises ClusterError where some trial could never start."""
        asked = groups(self.config, self.sweep, self.space)
        most = max(ClusterConfig(workers=workers).span[1] for workers in asked.values())
        await_nodes(self.config.cluster, most * max(1, self.sweep.concurrent), self.say, self.stop.asked)
        self.places, self.slots = Places(self.config.cluster), check_room()
        for depth, workers in asked.items():
            self.places.check(workers, f"a trial of depth {depth}")

    # -- while it runs ---------------------------------------------------------------------------------------------

    def _run(self, record: SweepRecord | None) -> Answer:
        self.tracker = self._open_tracker(record)
        with closing(Trials(train)) as trials:
            try:
                self.director = self._direct(trials)
            except BaseException:
                self.tracker.finish("FAILED")
                raise
            return self._directed(trials)

    def _directed(self, trials: Trials) -> Answer:
        self.storage.remove("result.json")  # of an earlier submission
        try:
            trials.run(self.director)
            self.held.check()
        except KeyboardInterrupt:
            self.stop.ask("SIGINT")
            self._end("stopped", "interrupted while it saved what ran; the same command goes on")
            raise
        except Exception as error:
            if self.held.lost:  # it is another driver's now
                self.tracker.finish(None)
            else:
                self._end("failed", str(error))
            raise
        self.director.leave()
        status, reason = self._status()
        found = self._end(status, reason)
        if self.stop.signum:
            raise supervise.Stopped(self.stop.signum)
        if self.director.lacks:
            raise ClusterError(f"{reason}")
        if status == "failed":
            raise TrainingError(f"{reason}")
        return found

    def _direct(self, trials: Trials) -> SweepDirector:
        tags = provenance.tags() | {"skiplane.kind": "trial", "skiplane.sweep": self.config.name}
        self.others = Others(self.config.tracking.uri)
        self.births = Births(self.config, self.sweep, self.space, self.counts, self.say, self.others, tags)
        at_once = min(self.sweep.concurrent or self.slots, self.slots)
        return SweepDirector(
            self.births, open_search(self.space, self.sweep, self.config.train.epochs), self._rule(), self.sweep.metric,
            self.journal, self.places, trials.stop, self.say, self._changed, self.stop,
            limit=self.sweep.max_failures, concurrent=at_once, wait_s=self.config.cluster.wait_seconds,
        )  # fmt: skip

    def _rule(self) -> Callable[[], Rule]:
        """Rungs are counted in samples, so that nets of unlike speed and batch are compared alike."""
        if self.sweep.stop == "none":
            return NoRule
        from orchestrator.cluster.rules import Asha, Median

        metric, factor = self.sweep.metric, self.sweep.factor
        least, most = samples_span(self.config, self.sweep, self.space, self.counts)
        grace = self.sweep.grace * least
        if self.sweep.stop == "median":
            return lambda: Median(metric, grace)
        return lambda: Asha(metric, grace, factor, most)

    def _changed(self, trials: Sequence[Trial]) -> None:
        """The table now and then; another driver's sweep is left alone."""
        if self.held.lost:
            self.stop.ask("another driver has the sweep")
        if time.monotonic() - self._told > TABLE_S:
            self._told = time.monotonic()
            self.say("\n" + self._table(trials) + "\n")

    def _table(self, trials: Sequence[Trial]) -> str:
        total = self.director.total
        running = max(1, sum(trial.state == "running" for trial in trials))
        left = ranking.time_left(trials, total, running)
        names = list(self.space.dimensions)
        return table.progress(self.config.name, trials, names, self.sweep.metric, total=total, left_s=left)

    # -- at its end ------------------------------------------------------------------------------------------------

    def _status(self) -> tuple[str, str | None]:
        if self.stop.asked():
            return "stopped", f"asked to by {self.stop.why}; the same command goes on"
        if self.director.lacks:
            return "stopped", f"{self.director.lacks}; the same command goes on"
        if self.director.gives_up:
            return "failed", (
                f"{self.director.failed} trials failed, sweep.max_failures allows {self.sweep.max_failures}; their "
                f"reasons are in {self.storage.place}/result.json; the same command with more allowed goes on"
            )
        return "finished", None

    def _end(self, status: str, reason: str | None) -> Answer:
        trials, names = [self._with_run(trial) for trial in self.director.trials], list(self.space.dimensions)
        url = self._view(len(trials))
        found = answer(
            self.config.name, status, trials, self.sweep.metric, storage=self.storage, base=self.config,
            command=self._command, url=url, reason=reason,
        )  # fmt: skip
        say_answer(found, trials, names, self.say)
        track(self.tracker, found, trials, names, self.storage, self.config.tracking)
        ends = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._say_left(self.tracker.finish(ends[status]))
        with suppress(ClusterError):  # what the storage does not show now is sent by hand
            folders = (Storage(self.births.folder(trial)) for trial in trials)
            self._say_left(self.others.end(folders, self.config.tracking.wait_seconds))
        return found

    def _with_run(self, trial: Trial) -> Trial:
        """Its run in MLflow may have been made after it said what it is."""
        if trial.mlflow_run_id is not None:
            return trial
        return replace(trial, mlflow_run_id=run_id_of(Storage(self.births.folder(trial))))

    def _say_left(self, shipped: Shipped) -> None:
        if shipped.left or shipped.refused:
            self.say(left_line(shipped, self.storage.place, self.config.tracking.uri))

    def _command(self, trial: Trial) -> str:
        try:
            return self.command(trial, self.births.config(trial))
        except SkiplaneError:  # what it took up is gone
            return self.command(trial, self.config)

    def _view(self, trials: int) -> str | None:
        """A link that opens all trials, best first."""
        if self.tracker.run_id is None:
            return None
        metric = self.sweep.metric
        view = sweep_view(
            self.config.name, self.tracker.run_id, list(self.space.dimensions), metric,
            more_is_better=METRICS[metric], runs=trials,
        )  # fmt: skip
        return self.tracker.view(view)

    def _open_tracker(self, record: SweepRecord | None) -> Tracker:
        """The sweep's run in MLflow, then sweep.json: the name now belongs to it."""
        said = identity(self.space, self.sweep)
        known = (record.id if record else "") or uuid.uuid4().hex
        tags = provenance.tags() | {"skiplane.kind": "sweep", "skiplane.sweep": self.config.name}
        tracker = open_tracker(
            Place(self.storage, self.held.number), self.config.tracking.uri, self.config.tracking.experiment,
            self.config.name, id=known, tags=tags | {"skiplane.state": "running"},
            params={f"sweep.{name}": _text(value) for name, value in said.items()},
            wait_s=self.config.tracking.wait_seconds,
        )  # fmt: skip
        self.held.confirm()
        self.journal.begin(SweepRecord(said, flatten(self.config), self.dataset.digest, tracker.run_id, known))
        return tracker


def _text(value: Any) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)
