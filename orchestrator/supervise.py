"""The life of a run: check, open, fit; on failure look again and fit again; `result.json` at the end.

Order of checks: settings (already), plan, data, tracking, cluster. Nothing is written before all of them hold.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator import provenance, worker
from orchestrator.cluster.group import Group, GroupDied, Mailbox, Size, raise_error
from orchestrator.cluster.room import find_room, find_workers
from orchestrator.cluster.session import job_id, session
from orchestrator.config import PLACEMENT, RunConfig, flatten, kinds
from orchestrator.context import Record
from orchestrator.plan import Plan, counts_of, efficiency, make_plan
from orchestrator.progress import Ear
from orchestrator.state.checkpoints import Checkpoints, step_of
from orchestrator.state.lease import Lease, lease
from orchestrator.state.records import Result, admit, read_result, record_of, write_record, write_result
from orchestrator.state.register import Register
from orchestrator.state.storage import Storage
from orchestrator.tracking import DatasetRef, NullTracker, Tracker, answers, open_tracker
from orchestrator.training.models.weights import read_weights
from orchestrator.worker import Job
from pipelines.dataset import Dataset, open_dataset, verify
from pipelines.errors import ConfigError, SkiplaneError, TrainingError
from pipelines.quarantine import allowed
from pipelines.remote.url import is_url

POLL_S = 0.3
END_S = 20.0  # that a group has to end after an error
Say = Callable[[str], None]


class Stopped(Exception):
    """The run was asked to stop and did; its checkpoint is whole. `signum` says by what."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class StopSignal:
    """Which signal asked for an end; None while nobody did."""

    signum: int | None = None

    def __call__(self, signum: int, _: FrameType | None) -> None:
        """The handler: a second signal ends the process at once."""
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


def run(
    config: RunConfig, *, parent: str | None = None, say: Say = print, tags: Mapping[str, str] | None = None
) -> Result:
    """Trains the run that `config` names, from wherever it is, to its end.

    Returns the result, at once where the run has finished before. Raises Stopped after a SIGINT or SIGTERM (the
    checkpoint is whole, the run resumable) and the SkiplaneError that ended it otherwise; both are in result.json.
    """
    if not config.name:
        raise ConfigError("name is not set; give the run a --name: the same name goes on with the same run")
    dataset = open_checked(config)
    plan = make_plan(config, counts_of(dataset))
    storage = Storage(config.folder())
    record = admit(storage, config, dataset.digest)
    done = read_result(storage)
    if done is not None and done.status == "finished" and done.epochs >= config.train.epochs:
        say(f"run {config.name} is finished: top-1 {_percent(done.top1)}; another --name trains anew")
        return done
    life = _Life(config, dataset, plan, storage, say)
    return life.live(record.mlflow_run_id if record else None, parent, dict(tags or {}))


def open_checked(config: RunConfig) -> Dataset:
    """The dataset, with its shards checked as data.verify says. Raises ConfigError, DataError."""
    root = config.data.root
    if config.model.init:
        read_weights(config.model.init)
    if not is_url(root) and not Path(root).exists():
        raise ConfigError(
            f"data.root is {root}, which does not exist; pack a dataset there (python -m jobs.pack --help) "
            f"or name another folder"
        )
    dataset = open_dataset(root, config.data.endpoint)
    verify(dataset, "size" if dataset.streamed else config.data.verify)  # streamed shards are hashed as they arrive
    return dataset


class _Life:
    """One submission of one run."""

    def __init__(self, config: RunConfig, dataset: Dataset, plan: Plan, storage: Storage, say: Say) -> None:
        self.config, self.dataset, self.plan = config, dataset, plan
        self.storage, self.say = storage, say
        self.checkpoints = Checkpoints(storage, config.train.keep, warn=say)
        self.restarts = 0
        self.workers = 0
        self.tracker: Tracker = NullTracker()
        self.stop = StopSignal()
        self.held: Lease  # while the cluster is joined
        self.fetched: Mapping[str, int] = {}

    def live(self, run_id: str | None, parent: str | None, tags: dict[str, str]) -> Result:
        """Server and cluster looked at, tracker open, attempts, result."""
        if self.config.tracking.uri != "off":
            answers(self.config.tracking.uri)
        with session(self.config.cluster.cpus), _signals(self.stop):  # in this order: ray.init takes SIGTERM
            find_workers(self.config.cluster)
            with lease(self.storage, self.config.name, self.say) as self.held:
                self.register = self._open_register()
                self.tracker = self._open_tracker(run_id, parent, tags)
                return self._tracked()

    def _tracked(self) -> Result:
        """Attempts, result, and the end of the MLflow run."""
        self.storage.remove("result.json")  # of an earlier submission, which this one goes on with
        status = "FAILED"
        try:
            result = self._result(self._attempts())
            status = "KILLED" if result.status == "stopped" else "FINISHED"
        except KeyboardInterrupt:
            status, result = "KILLED", self._ended("stopped", "interrupted before a checkpoint of its own")
        except Exception as error:
            self._ended(
                "failed", str(error) if isinstance(error, SkiplaneError) else f"{type(error).__name__}: {error}"
            )
            raise
        finally:
            left = self.tracker.finish(status)
            if left:
                self.say(
                    f"tracking: {left} records did not reach {self.config.tracking.uri} and are lost there; what the "
                    f"run is and was stands in {self.storage.place}"
                )
        if result.status == "stopped":
            raise Stopped(self.stop.signum or signal.SIGINT)
        return result

    # -- attempts ------------------------------------------------------------------------------------------------

    def _attempts(self) -> dict[str, Any]:
        """Fits until a group ends by itself; failures in a row without progress are limited."""
        failures, reached = 0, self._resume_step()
        ear = Ear(self.config, self.plan, self.register, self.tracker, self.say)
        self.fetched = ear.fetched
        while True:
            mailbox = Mailbox()  # a new one each time: it may be what was lost
            try:
                return self._attempt(mailbox, ear)
            except GroupDied as died:
                now = self._resume_step()
                failures, reached = (0 if now > reached else failures) + 1, max(now, reached)
                self._after_death(died, failures)
            finally:
                mailbox.close()

    def _attempt(self, mailbox: Mailbox, ear: Ear) -> dict[str, Any]:
        size = find_room(self.config, self.dataset, self.storage, self.say, self._asked)
        found = self.checkpoints.latest()
        self.workers = size.workers
        self._announce(size, found.progress.step if found else 0)
        if self.restarts:
            ear.resumes_at(found.progress.step if found else 0)
        job = Job(self.config, found.name if found else None, self.dataset.digest)
        group = Group(worker.train, job, size, mailbox, f"{self.config.name}-{self.restarts}")
        asked = False
        while not group.wait(POLL_S):
            self._hear_all(mailbox, ear, group)
            if self.stop.signum is not None and not asked:
                asked = True
                self.say(f"{signal.Signals(self.stop.signum).name}: saving a checkpoint, then stopping")
                self.tracker.tags({"skiplane.state": "stopping"})
                mailbox.ask_stop()
        self._hear(mailbox, ear)
        return group.outcome() or {}

    def _hear_all(self, mailbox: Mailbox, ear: Ear, group: Group) -> None:
        """Of a group that runs. It ends before an error is raised: Ray's session, ended under its thread, would end
        this process too, without a word."""
        try:
            self.held.check()
            self._hear(mailbox, ear)
        except SkiplaneError:
            mailbox.ask_stop()
            group.wait(END_S)
            raise

    def _hear(self, mailbox: Mailbox, ear: Ear) -> None:
        records: list[Record] = mailbox.drain()
        ear.hear([r for r in records if r["kind"] != "error"])
        for record in records:
            if record["kind"] == "error":
                raise_error(record)

    def _after_death(self, died: GroupDied, failures: int) -> None:
        if self.stop.signum is not None:
            raise KeyboardInterrupt from died
        if failures > self.config.cluster.max_restarts:
            raise TrainingError(
                f"the workers died {failures} times without a new checkpoint (cluster.max_restarts = "
                f"{self.config.cluster.max_restarts}); the last time: {died}"
            ) from died
        self.restarts += 1
        pause = min(2.0 ** (failures - 1), 30.0) - 1.0
        self.say(f"restart {self.restarts}: {died}" + (f"; trying again in {pause:.0f} s" if pause else ""))
        self.tracker.tags({"skiplane.restarts": str(self.restarts)})
        time.sleep(pause)

    def _asked(self) -> bool:
        return self.stop.signum is not None

    def _open_register(self) -> Register:
        splits, share = self.dataset.splits, self.config.data.max_bad
        return Register(self.storage, {s: allowed(share, splits[s].samples) for s in splits}, self.say)

    def _resume_step(self) -> int:
        names = self.checkpoints.names()
        return step_of(names[-1]) if names else 0

    # -- words ---------------------------------------------------------------------------------------------------

    def _open_tracker(self, run_id: str | None, parent: str | None, tags: dict[str, str]) -> Tracker:
        """Opens the MLflow run, then writes run.json: the run's name now belongs to these settings."""
        config = self.config
        if config.tracking.uri == "off":
            tracker: Tracker = NullTracker()
        else:
            data = DatasetRef(config.data.name, self.dataset.digest, config.data.root)
            tracker = open_tracker(
                config.tracking.uri,
                config.tracking.experiment,
                config.name,
                run_id=run_id,
                parent_id=parent,
                params=self._params(),
                tags=self._tags() | tags,
                dataset=data,
            )
        try:
            self.held.confirm()
            write_record(self.storage, record_of(config, self.dataset.digest, tracker.run_id))
        except BaseException:
            tracker.finish("FAILED")
            raise
        return tracker

    def _params(self) -> dict[str, str]:
        """Identity and horizon; placement may change, and a parameter of MLflow may not."""
        kind = kinds()
        return {name: str(value) for name, value in flatten(self.config).items() if kind[name] != PLACEMENT}

    def _tags(self) -> dict[str, str]:
        arch = self.config.model.arch(self.plan.classes)
        return provenance.tags() | {
            "skiplane.kind": "train",
            "skiplane.run": self.config.name,
            "skiplane.arch": arch.name,
            "skiplane.dataset_digest": self.dataset.digest,
            "skiplane.storage": self.storage.place,
            "skiplane.state": "running",
        }

    def _announce(self, size: Size, step: int) -> None:
        epoch, at = self.plan.position(step)
        where = f"from epoch {epoch + 1} step {at}" if step else "from the start"
        device = "1 GPU" if size.gpus else f"{size.cpus} CPU"
        share = efficiency(self.config.data.lanes, size.workers)
        self.say(
            f"{self.config.name}: {size.workers} workers, {device} each, {self.config.data.lanes} lanes "
            f"({share:.0%} of the workers' time used), {where}"
        )
        self.tracker.tags({"skiplane.world_size": str(size.workers), "ray.job_id": job_id()})

    def _result(self, summary: dict[str, Any]) -> Result:
        result = self._compose(summary)
        self.held.confirm()
        write_result(self.storage, result)
        self.tracker.tags({"skiplane.state": result.status, "skiplane.weights_sha256": str(result.weights_sha256)})
        return result

    def _ended(self, status: str, reason: str) -> Result:
        """A result for a run that did not end by itself; what the last checkpoint holds is kept."""
        step = self._resume_step()
        result = self._compose(
            {"status": status, "steps": step, "epochs": step // self.plan.steps_per_epoch, "reason": reason}
        )
        self.held.confirm()
        write_result(self.storage, result)
        self.tracker.tags({"skiplane.state": status, "skiplane.reason": reason[:500]})
        return result

    def _compose(self, summary: dict[str, Any]) -> Result:
        return Result.of(
            summary,
            name=self.config.name,
            dataset_digest=self.dataset.digest,
            world_size=self.workers,
            restarts=self.restarts,
            bad_images=self.register.to_list(),
            fetched=dict(self.fetched),
            parameters=self.plan.parameters,
            multiply_adds=self.plan.multiply_adds,
            mlflow_run_id=self.tracker.run_id,
            mlflow_url=self.tracker.url,
        )


@contextmanager
def _signals(stop: StopSignal) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a checkpoint and an end, while this lasts."""
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2%}"
