"""One submission's attempts at a run: a group of workers, and another when it dies, loses a node or may grow.

A group has a fixed size. What changes it ends it: after a checkpoint where that is possible, so nothing is repeated.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from orchestrator import worker
from orchestrator.cluster.crews import Crews
from orchestrator.cluster.group import Group, Size, raise_error
from orchestrator.cluster.mailbox import GroupDied
from orchestrator.cluster.room import Room
from orchestrator.cluster.session import job_id
from orchestrator.cluster.watch import Watch
from orchestrator.config import RunConfig
from orchestrator.context import Record
from orchestrator.plan import Plan, efficiency
from orchestrator.progress import Ear
from orchestrator.state.checkpoints import Checkpoints
from orchestrator.state.lease import Lease
from orchestrator.stop import Stop
from orchestrator.tracking import Tracker
from orchestrator.vitals import Vitals
from orchestrator.worker import Job
from pipelines.errors import SkiplaneError, TrainingError

POLL_S = 0.2
END_S = 20.0  # that workers have to save their state after an error of another
GRACE_S = 1.5  # that Ray has to end a group of which a worker said that it cannot go on
LONGEST_PAUSE_S = 30.0  # between groups that die one after the other
Say = Callable[[str], None]


@dataclass
class Attempts:
    """What one submission needs to train a run, and what became of it so far.

    run_id names the run's copies in memory; digest is that of the dataset; label is the run's name where it is shown
    among others.
    """

    config: RunConfig
    plan: Plan
    room: Room
    crews: Crews
    checkpoints: Checkpoints
    held: Lease
    ear: Ear
    tracker: Tracker
    say: Say
    stop: Stop
    run_id: str
    digest: str
    label: str
    number: int = 0  # of attempts begun
    restarts: int = 0  # after a death
    resizes: int = 0
    repeated: int = 0  # steps
    workers: int = 0  # of the newest group
    _failures: int = 0  # in a row, without progress
    _begun: int = -1  # step that the newest group went on from
    _began: float | None = None  # when it did; None while it starts
    _trained: int = 0  # workers of the newest group that got so far
    _taken_up: bool = False  # whether the newest group is an earlier run's

    def run(self, size: Size) -> dict[str, Any]:
        """The first group's size -> rank 0's summary: the run is finished, or was asked to stop and has its checkpoint.

        Raises the SkiplaneError that ended it; TrainingError where groups die without progress.
        """
        try:
            with Vitals(self.label, self.plan, self) as vitals:
                while True:
                    try:
                        if summary := self._attempt(size, vitals):
                            return summary
                    except GroupDied as died:
                        self._after_death(died)
                    size = self.room.find(again=True)
                    self._heed_stop()
        except BaseException:
            self.crews.settle()
            raise

    def _attempt(self, size: Size, vitals: Vitals) -> dict[str, Any] | None:
        """One group, until its work is done: rank 0's summary, or None where another group is to go on."""
        self.number += 1
        fence = self.held.begin(self.number)
        found = self.checkpoints.latest()
        resume, step = (found.name, found.progress.step) if found else (None, 0)
        self.ear.recall(found.progress.curve if found else [])
        del found  # the size of a checkpoint
        self.workers = size.workers
        self._announce(size, step)
        job = Job(self.config, resume, self.digest, self.run_id, fence, self.label)
        self._began = None
        group = self.crews.take(size, worker.train, job, f"{self.config.name}-{self.number}")
        self._taken_up = group.works > 1
        try:
            with closing(Watch(self.room, size.workers)) as watch, vitals.group(size.workers):
                summary = _Watched(self, group, watch, vitals).outcome()
        except BaseException:
            self.crews.end(group)
            raise
        if summary["status"] == "finished" or summary.get("reason") or self.stop.asked():
            self.crews.give_back(group)
            return summary
        self.crews.end(group)
        self.crews.settle()
        return None

    # -- what the group says -------------------------------------------------------------------------------------

    @property
    def starts(self) -> bool:
        """Whether the newest group has nothing yet that could be lost."""
        return self._began is None

    def restored(self, step: int, source: str) -> None:
        """The position is the data's whole state, so no sample is lost; what is repeated is said."""
        epoch, at = self.plan.position(step)
        where, repeated = f"epoch {epoch + 1} step {at}", max(self.ear.reached - step, 0)
        if step > self._begun:
            self._failures = 0
        self._begun, self._began = step, time.monotonic()
        self.ear.reached = step
        before, self._trained = self._trained, self.workers
        if not before:
            if source == "from memory":
                self.say(f"going on at {where}, {source}: newer than the checkpoint in storage")
            elif source == f"from {self.config.train.fork}":
                self.say(f"beginning at {where}, {source}")
            return
        self.resizes, self.repeated = self.resizes + (before != self.workers), self.repeated + repeated
        what = "resumed" if before == self.workers else f"resize {before} -> {self.workers}"
        self.say(f"{what} at {where}: 0 samples lost, {repeated} steps repeated, {source or 'from the start'}")
        self.tracker.tags({"skiplane.resizes": str(self.resizes), "skiplane.steps_repeated": str(self.repeated)})

    def grows(self, possible: int) -> bool:
        """Whether more workers are worth a new group: the fullest one would have fewer lanes."""
        if self._began is None or time.monotonic() - self._began < self.config.cluster.grow_seconds:
            return False
        lanes = self.config.data.lanes
        return self.ear.reached > self._begun and -(-lanes // possible) < -(-lanes // self.workers)

    # -- between groups ------------------------------------------------------------------------------------------

    def _after_death(self, died: GroupDied) -> None:
        if self.stop.asked():
            raise KeyboardInterrupt from died
        if self._taken_up and self.starts:
            self.say(f"the workers of the run before are gone ({died}): others are started")
            return  # they died while they were idle
        self._failures += 1
        limit = self.config.cluster.max_restarts
        if self._failures > limit:
            raise TrainingError(
                f"the workers died {self._failures} times without progress (cluster.max_restarts = {limit}); the last "
                f"time: {died}"
            ) from died
        self.restarts += 1
        pause = min(2.0 ** (self._failures - 1), LONGEST_PAUSE_S) - 1.0
        self.say(f"restart {self.restarts}: {died}" + (f"; trying again in {pause:.0f} s" if pause else ""))
        self.tracker.tags({"skiplane.restarts": str(self.restarts)})
        until = time.monotonic() + pause
        while time.monotonic() < until:
            self._heed_stop()
            time.sleep(POLL_S)

    def _heed_stop(self) -> None:
        """Between groups there is nothing to save."""
        if self.stop.asked():
            raise KeyboardInterrupt

    def _announce(self, size: Size, step: int) -> None:
        epoch, at = self.plan.position(step)
        begins = "from train.fork" if self.config.train.fork else "from the start"
        where = f"from epoch {epoch + 1} step {at}" if step else begins
        device = "1 GPU" if size.gpus else f"{size.cpus} CPU"
        share = efficiency(self.config.data.lanes, size.workers)
        self.ear.stage(
            f"{self.config.name}: {size.workers} workers, {device} each, {self.config.data.lanes} lanes "
            f"({share:.0%} of the workers' time used), {where}"
        )
        self.tracker.tags({"skiplane.world_size": str(size.workers), "ray.job_id": job_id()})


class _Watched:
    """A group that trains, and what is known of it."""

    def __init__(self, attempts: Attempts, group: Group, watch: Watch, vitals: Vitals) -> None:
        self._attempts, self._group, self._watch, self._vitals = attempts, group, watch, vitals
        self._lost: dict[int, str] = {}  # rank -> why it cannot go on
        self._lost_at = 0.0
        self._asked_at = -math.inf

    def outcome(self) -> dict[str, Any]:
        """Rank 0's summary. Raises GroupDied, or the SkiplaneError that a worker reported."""
        while not (self._group.done or self._group.wait(POLL_S)):
            try:
                self._attempts.held.check()
                self._hear()
                self._check_lost()
                if self._asked_at == -math.inf and self._ask_to_end():
                    self._asked_at = time.monotonic()
            except (SkiplaneError, GroupDied):
                self._end()
                raise
        self._hear()
        return self._group.outcome()

    def _hear(self) -> None:
        records: list[Record] = self._group.hear()
        for record in records:
            match record["kind"]:
                case "worker":
                    self._watch.held = {*self._watch.held, record["node"]}
                case "restored":
                    self._attempts.restored(record["global_step"], record["source"])
                case "lost":
                    self._lost_at = self._lost_at or time.monotonic()
                    self._lost[record["rank"]] = record["cause"]
        self._vitals.hear(records)
        self._attempts.ear.hear(records)
        for record in records:
            if record["kind"] == "error":
                raise_error(record)

    def _check_lost(self) -> None:
        """Raises GroupDied where the group cannot go on and Ray does not end it by itself: it may take a minute.

        A group that was asked to end has time for it: a node that was told to go goes when its worker has ended.
        """
        ending = time.monotonic() - self._asked_at < END_S
        if lost := [node for node in self._watch.lost if not (ending and node in self._watch.leaving)]:
            raise GroupDied(f"node {', '.join(lost)} is lost or does not answer")
        if self._lost and time.monotonic() - self._lost_at > GRACE_S:
            raise GroupDied("; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(self._lost.items())))

    def _end(self) -> None:
        """Workers that can save their state may, others are ended."""
        self._group.dismiss()
        if not (self._lost or self._watch.lost or self._attempts.starts):
            self._group.wait(END_S)
        self._group.kill()

    def _ask_to_end(self) -> bool:
        """Whether there is a reason for it."""
        stop, watch = self._attempts.stop, self._watch
        if stop.asked() and self._attempts.starts:
            raise GroupDied("stopped while it started")
        if stop.asked():
            why = f"{stop.why}: saving a checkpoint, then stopping"
            self._attempts.tracker.tags({"skiplane.state": "stopping"})
        elif watch.leaving:
            names = ", ".join(watch.leaving)
            why = f"node {names} was told to go: saving a checkpoint, then going on without it"
        elif self._attempts.grows(watch.possible):
            why = f"there is room for {watch.possible} workers: saving a checkpoint, then going on with them"
        else:
            return False
        self._attempts.ear.stage(why)
        self._group.ask_stop()
        return True
