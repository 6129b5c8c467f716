"""One submission's attempts at a run: a group of workers, and another when it dies, loses a node or may grow.

A group has a fixed size. What changes it ends it: after a checkpoint where that is possible, so nothing is repeated.
"""

import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from types import FrameType
from typing import Any

from orchestrator import worker
from orchestrator.cluster.group import Group, GroupDied, Mailbox, Size, raise_error
from orchestrator.cluster.room import Room
from orchestrator.cluster.session import job_id
from orchestrator.cluster.watch import Watch
from orchestrator.config import RunConfig
from orchestrator.context import Record
from orchestrator.plan import Plan, efficiency
from orchestrator.progress import Ear
from orchestrator.state.checkpoints import Checkpoints
from orchestrator.state.lease import Lease
from orchestrator.tracking import Tracker
from orchestrator.worker import Job
from pipelines.errors import SkiplaneError, TrainingError

POLL_S = 0.2
END_S = 20.0  # that a group has to end after an error
LONGEST_PAUSE_S = 30.0  # between groups that die one after the other
Say = Callable[[str], None]


@dataclass
class StopSignal:
    """Which signal asked for an end; None while nobody did."""

    signum: int | None = None

    def __call__(self, signum: int, _: FrameType | None) -> None:
        """The handler: a second signal ends the process at once."""
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def asked(self) -> bool:
        """Whether one came."""
        return self.signum is not None


@dataclass
class Attempts:
    """What one submission needs to train a run, and what became of it so far.

    run_id names the run's copies in memory; digest is that of the dataset.
    """

    config: RunConfig
    plan: Plan
    room: Room
    checkpoints: Checkpoints
    held: Lease
    ear: Ear
    tracker: Tracker
    say: Say
    stop: StopSignal
    run_id: str
    digest: str
    number: int = 0  # of attempts begun
    restarts: int = 0  # after a death
    resizes: int = 0
    repeated: int = 0  # steps
    workers: int = 0  # of the newest group
    _failures: int = 0  # in a row, without progress
    _begun: int = -1  # step that the newest group went on from
    _began: float | None = None  # when it did; None while it starts

    def run(self) -> dict[str, Any]:
        """Rank 0's summary: the run is finished, or was asked to stop and has its checkpoint.

        Raises the SkiplaneError that ended it; TrainingError where groups die without progress.
        """
        with closing(Mailbox()) as mailbox:
            size = self.room.find()
            while True:
                try:
                    summary = self._attempt(size, mailbox)
                    if summary["status"] == "finished" or self.stop.asked():
                        return summary
                except GroupDied as died:
                    self._after_death(died)
                size = self.room.find(again=True)

    def _attempt(self, size: Size, mailbox: Mailbox) -> dict[str, Any]:
        self.held.confirm()
        self.number += 1
        mailbox.begin(self.number)
        found = self.checkpoints.latest()
        before, self.workers = self.workers, size.workers
        self._announce(size, found.progress.step if found else 0)
        job = Job(self.config, found.name if found else None, self.digest, self.run_id, self.held.number, self.number)
        group = Group(worker.train, job, size, mailbox, f"{self.config.name}-{self.number}")
        self._began = None
        with closing(Watch(self.room, size.workers)) as watch:
            asked = False
            while not group.wait(POLL_S):
                self._hear_all(mailbox, watch, group, before)
                asked = asked or self._ask_to_end(mailbox, watch)
            self._hear(mailbox, watch, before)
        return group.outcome() or {}

    # -- a group that trains -------------------------------------------------------------------------------------

    def _hear_all(self, mailbox: Mailbox, watch: Watch, group: Group, before: int) -> None:
        """It ends before an error is raised: Ray's session, ended under its thread, would end this process too,
        without a word."""
        try:
            self.held.check()
            self._hear(mailbox, watch, before)
        except (SkiplaneError, GroupDied):
            mailbox.ask_stop()
            group.wait(END_S)
            raise

    def _hear(self, mailbox: Mailbox, watch: Watch, before: int) -> None:
        records: list[Record] = mailbox.drain()
        watch.held = {*watch.held, *(r["node"] for r in records if r["kind"] == "node")}
        for record in records:
            if record["kind"] == "restored":
                self._restored(record["global_step"], record["source"], before)
        self.ear.hear([r for r in records if r["kind"] != "error"])
        for record in records:
            if record["kind"] == "error":
                raise_error(record)

    def _ask_to_end(self, mailbox: Mailbox, watch: Watch) -> bool:
        """Whether there is a reason for it."""
        if self.stop.signum is not None:
            why = f"{signal.Signals(self.stop.signum).name}: saving a checkpoint, then stopping"
        elif watch.leaving:
            names = ", ".join(node.address for node in watch.leaving)
            why = f"node {names} was told to go: saving a checkpoint, then going on without it"
        elif self._grows(watch.possible):
            why = f"there is room for {watch.possible} workers: saving a checkpoint, then going on with them"
        else:
            return False
        self.say(why)
        if self.stop.asked():
            self.tracker.tags({"skiplane.state": "stopping"})
        mailbox.ask_stop()
        return True

    def _grows(self, possible: int) -> bool:
        """Whether more workers are worth a new group: the fullest one would have fewer lanes."""
        if self._began is None or time.monotonic() - self._began < self.config.cluster.grow_seconds:
            return False
        lanes = self.config.data.lanes
        return self.ear.reached > self._begun and -(-lanes // possible) < -(-lanes // self.workers)

    def _restored(self, step: int, source: str, before: int) -> None:
        """The position is the data's whole state, so no sample is lost; what is repeated is said."""
        epoch, at = self.plan.position(step)
        where, repeated = f"epoch {epoch + 1} step {at}", max(self.ear.reached - step, 0)
        if step > self._begun:
            self._failures = 0
        self._begun, self._began = step, time.monotonic()
        if not before:
            if source == "from memory":
                self.say(f"going on at {where}, {source}: newer than the checkpoint in storage")
            self.ear.reached = step
            return
        self.resizes, self.repeated = self.resizes + (before != self.workers), self.repeated + repeated
        what = "resumed" if before == self.workers else f"resize {before} -> {self.workers}"
        self.say(f"{what} at {where}: 0 samples lost, {repeated} steps repeated, {source or 'from the start'}")
        self.tracker.tags({"skiplane.resizes": str(self.resizes), "skiplane.steps_repeated": str(self.repeated)})

    # -- between groups ------------------------------------------------------------------------------------------

    def _after_death(self, died: GroupDied) -> None:
        if self.stop.asked():
            raise KeyboardInterrupt from died
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
        time.sleep(pause)

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
