"""The life of a run: check, open, fit; on failure look again and fit again; `result.json` at the end.

Order of checks: settings (already), plan, data, tracking, cluster. Nothing is written before all of them hold.
"""

import math
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator import page, provenance
from orchestrator.attempts import Attempts
from orchestrator.cluster.crews import Crews
from orchestrator.cluster.group import Size
from orchestrator.cluster.room import Room, find_workers
from orchestrator.cluster.scaling import await_nodes
from orchestrator.cluster.session import job_id, session
from orchestrator.config import PLACEMENT, RunConfig, flatten, kinds
from orchestrator.plan import Plan, counts_of, make_plan
from orchestrator.progress import Ear, Lines, Show
from orchestrator.state.checkpoints import Checkpoints, step_of
from orchestrator.state.fork import check_fork
from orchestrator.state.lease import lease
from orchestrator.state.records import (
    Result,
    admit,
    read_result,
    record_of,
    write_record,
    write_result,
)
from orchestrator.state.register import Register
from orchestrator.state.storage import Storage
from orchestrator.stop import Stop, heeding_signals
from orchestrator.tally import Tally
from orchestrator.tracking import (
    DatasetRef,
    NullTracker,
    Place,
    Shipped,
    Tracker,
    left_line,
    look_for_server,
    open_tracker,
)
from orchestrator.training.models.weights import read_weights
from pipelines.dataset import Dataset, open_dataset, verify
from pipelines.errors import ClusterError, ConfigError, SkiplaneError
from pipelines.quarantine import allowed
from pipelines.remote.url import is_url

Say = Callable[[str], None]


class Stopped(Exception):
    """The run was asked to stop and did; its checkpoint is whole. `signum` says by what."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run(config: RunConfig, *, child: bool = False, sends: bool = True, title: str = "",
        tags: Mapping[str, str] | None = None, say: Say = print, stop: Stop | None = None, show: Show | None = None,
        crews: Crews | None = None) -> Result:  # fmt: skip
    """Trains the run that `config` names, from wherever it is, to its end or to train.stop_after.

    child: one of several runs, whose study or sweep is the folder above. sends: whether what is tracked is sent from
    here; else another process does. title and tags: of its run in MLflow. stop:
    whoever may ask for an end; without it SIGINT and SIGTERM do. show: who sees how far it is; without it lines are
    said. crews: of a driver of several runs, which take up one another's workers.

    Returns the result, at once where the run has ended before. Raises Stopped after a signal (the checkpoint is whole,
    the run resumable), or where it was stopped before it began, and the SkiplaneError that ended it otherwise; both
    are in result.json.
    """
    if not config.name:
        raise ConfigError("name is not set; give the run a --name: the same name goes on with the same run")
    dataset = open_checked(config)
    plan = make_plan(config, counts_of(dataset))
    storage = Storage(config.folder())
    admit(storage, config, dataset.digest)  # before anything is contacted; and again once the run is held
    if (done := read_result(storage)) and _ended_before(done, config):
        say(f"run {config.name} is {done.status}: top-1 {_percent(done.top1)}; another --name trains anew")
        return done
    check_fork(config, plan, dataset.digest)
    life = _Life(config, dataset, plan, storage, say, show or Lines(config, plan, say), child=child, sends=sends)
    return life.live(title or config.name, dict(tags or {}), stop, crews)


def _ended_before(done: Result, config: RunConfig) -> bool:
    """Whether nothing is left to do."""
    if done.status == "finished":
        return done.epochs >= config.train.epochs
    return done.status == "stopped" and 0 < config.train.stop_after <= done.epochs


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

    def __init__(self, config: RunConfig, dataset: Dataset, plan: Plan, storage: Storage, say: Say, show: Show, *,
                 child: bool, sends: bool) -> None:  # fmt: skip
        self.config, self.dataset, self.plan = config, dataset, plan
        self.storage, self.say, self.show = storage, say, show
        self.child, self.sends = child, sends
        self.checkpoints = Checkpoints(storage, config.train.keep, warn=say)
        self.tracker: Tracker = NullTracker()
        self.stop = Stop()
        self.attempts: Attempts | None = None
        self.origin = provenance.tags()

    def live(self, title: str, tags: dict[str, str], stop: Stop | None, crews: Crews | None) -> Result:
        """Server and cluster looked at, and nothing written; then tracker, run.json, attempts, result."""
        look_for_server(self.storage, self.config.tracking.uri, self.child)
        self.stop = stop or self.stop
        heeding = nullcontext() if stop else heeding_signals(self.stop)
        own = nullcontext(crews) if crews else Crews(idle_s=0)
        # In this order: ray.init takes SIGTERM.
        with session(self.config.cluster.cpus, self.say), heeding, own as self.crews:
            self._await_nodes()
            find_workers(self.config.cluster)
            with lease(self.storage, self.config.name, self.say) as self.held:
                record = admit(self.storage, self.config, self.dataset.digest)
                self._check_horizon()
                size = self._find_room()
                self.register = self._open_register()
                self.run_id = record.id if record and record.id else uuid.uuid4().hex
                self.tracker = self._open_tracker(title, tags)
                return self._tracked(size)

    def _check_horizon(self) -> None:
        """Raises ConfigError where the run has gone beyond train.epochs."""
        epochs, done = self.config.train.epochs, self._resume_step() / self.plan.steps_per_epoch
        if done > epochs:
            raise ConfigError(
                f"train.epochs is {epochs}, and the run has done {done:.1f}; ask for {math.ceil(done)} or more, or use "
                f"another --name"
            )

    def _await_nodes(self) -> None:
        """Those that an autoscaler adds, but for a driver's later runs: they take up the workers of the one before."""
        cluster = self.config.cluster
        if not self.crews.idle():
            with self._before_it_began():
                await_nodes(cluster, cluster.span[1], self.say, self.stop.asked)

    def _find_room(self) -> Size:
        self.room = Room(self.config, self.dataset, self.storage, self.crews, self.say, self.stop.asked)
        with self._before_it_began():
            return self.room.find()

    @contextmanager
    def _before_it_began(self) -> Iterator[None]:
        """Raises Stopped where that was asked meanwhile: nothing is written yet."""
        try:
            yield
        except KeyboardInterrupt:
            raise Stopped(self.stop.signum or signal.SIGINT) from None

    def _tracked(self, size: Size) -> Result:
        """Attempts, result, and the end of the MLflow run; neither is touched once another driver has the run."""
        self.storage.remove("result.json")  # of an earlier submission, which this one goes on with
        status = "FAILED"
        try:
            result = self._result(self._train(size))
            status = "KILLED" if self.stop.asked() and result.status == "stopped" else "FINISHED"
        except KeyboardInterrupt:
            status, result = "KILLED", self._ended("stopped", "interrupted before a checkpoint of its own")
        except Exception as error:
            if not self.held.lost:
                self._fail(_reason(error))
            raise
        finally:
            shipped = self.tracker.finish(None if self.held.lost else status)
            if self.sends and (shipped.left or shipped.refused):
                self.say(left_line(shipped, self.storage.place, self.config.tracking.uri))
        result = self._with(shipped, result)
        if self.stop.signum and result.status == "stopped":
            raise Stopped(self.stop.signum)
        return result

    def _train(self, size: Size) -> dict[str, Any]:
        config, say = self.config, self.say
        self.attempts = Attempts(
            config,
            self.plan,
            self.room,
            self.crews,
            self.checkpoints,
            self.held,
            Ear(config, self.plan, self.register, self.tracker, say, self.show),
            self.tracker,
            say,
            self.stop,
            self.run_id,
            self.dataset.digest,
            label=f"{Path(config.cluster.storage).name}/{config.name}" if self.child else config.name,
        )
        summary = self.attempts.run(size)
        if summary["status"] == "stopped" and self.stop.asked():
            summary = {**summary, "reason": f"asked to by {self.stop.why}"}
        return summary

    def _open_register(self) -> Register:
        splits, share = self.dataset.splits, self.config.data.max_bad
        return Register(self.storage, {s: allowed(share, splits[s].samples) for s in splits}, self.say)

    def _resume_step(self) -> int:
        names = self.checkpoints.names()
        return step_of(names[-1]) if names else 0

    # -- words ---------------------------------------------------------------------------------------------------

    def _open_tracker(self, title: str, tags: dict[str, str]) -> Tracker:
        """Opens the MLflow run, then writes run.json: the run's name now belongs to these settings."""
        config = self.config
        tracker = open_tracker(
            Place(self.storage, self.held.number),
            config.tracking.uri,
            config.tracking.experiment,
            title,
            id=self.run_id,
            child=self.child,
            params=self._params(),
            tags=self._tags() | tags,
            dataset=DatasetRef(config.data.name, self.dataset.digest, config.data.root),
            wait_s=config.tracking.wait_seconds,
            sends=self.sends,
        )
        try:
            self.held.confirm()
            write_record(self.storage, record_of(config, self.dataset.digest, tracker.run_id, self.run_id))
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
        return self.origin | {
            "skiplane.kind": "train",
            "skiplane.run": self.config.name,
            "skiplane.arch": arch.name,
            "skiplane.dataset_digest": self.dataset.digest,
            "skiplane.storage": self.storage.place,
            "skiplane.state": "running",
        }

    def _result(self, summary: dict[str, Any]) -> Result:
        result = self._compose(summary)
        self.held.confirm()
        write_result(self.storage, result)
        self.tracker.tags({"skiplane.state": result.status, "skiplane.weights_sha256": str(result.weights_sha256)})
        self._publish(result)
        kept, tracking = result.best_checkpoint or result.checkpoint, self.config.tracking
        if result.status == "finished" and kept and tracking.model and not self.child:  # a child's is its parent's
            self.tracker.model(kept, tracking.register_as, tracking.alias)
        return result

    def _with(self, shipped: Shipped, result: Result) -> Result:
        """The result once more, with what became of its tracking; where that cannot be written it stands without."""
        if shipped.records:
            where = self.tracker
            result = replace(result, tracking=asdict(shipped), mlflow_run_id=where.run_id, mlflow_url=where.url)
            with suppress(ClusterError):
                self.held.confirm()
                write_result(self.storage, result)
        return result

    def _fail(self, reason: str) -> None:
        """The result of a run that fails; what it fails of may keep that from being written, too."""
        try:
            self._ended("failed", reason)
        except ClusterError as error:
            self.say(f"result.json is not written: {error}")

    def _ended(self, status: str, reason: str) -> Result:
        """A result for a run that did not end by itself; what the last checkpoint holds is kept."""
        found, step = self.checkpoints.latest(), self._resume_step()
        tally = Tally(found.progress) if found else None
        known = tally.summary() if tally else {}
        about = {"status": status, "steps": step, "epochs": tally.closed if tally else 0, "reason": reason}
        result = self._compose(known | about)
        self.held.confirm()
        write_result(self.storage, result)
        self.tracker.tags({"skiplane.state": status, "skiplane.reason": reason[:500]})
        self._publish(result)
        return result

    def _publish(self, result: Result) -> None:
        counts = self.attempts.ear.classes if self.attempts else {}
        tags = self.origin | {"ray.job_id": job_id()}
        about = self.tracker, self.config, self.plan, self.dataset, result
        page.publish(*about, counts, tags, self.say, child=self.child)

    def _compose(self, summary: dict[str, Any]) -> Result:
        names, best, tried = self.checkpoints.names(), self.checkpoints.best_name(), self.attempts
        return Result.of(
            summary,
            name=self.config.name,
            dataset_digest=self.dataset.digest,
            world_size=tried.workers if tried else 0,
            restarts=tried.restarts if tried else 0,
            resizes=tried.resizes if tried else 0,
            steps_repeated=tried.repeated if tried else 0,
            bad_images=self.register.to_list(),
            fetched=dict(tried.ear.fetched) if tried else {},
            parameters=self.plan.parameters,
            multiply_adds=self.plan.multiply_adds,
            checkpoint=names[-1] if names else None,
            best_checkpoint=best,
            resumable=bool(names) and summary["status"] != "finished",
            mlflow_run_id=self.tracker.run_id,
            mlflow_url=self.tracker.url,
        )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, SkiplaneError) else f"{type(error).__name__}: {error}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2%}"
