"""What each worker does: builds the parts, restores, loops. The one place where everything meets.

    dataset.json -> plan -> order -> reader -> DALI -> Batch -> step -> StepStats -> tally -> checkpoint, records

Nothing here knows Ray or MLflow: a worker sees a Context.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.config import RunConfig
from orchestrator.context import Context, Record
from orchestrator.feed import bad_record, threads_of, training_feed
from orchestrator.odometer import Odometer
from orchestrator.plan import counts_of, eval_ids, lanes_of, learning_rate, make_plan
from orchestrator.rhythm import Ask, Rhythm
from orchestrator.sensors import Sensors
from orchestrator.state.checkpoints import Checkpoints, Owner, step_of, weights_sha256
from orchestrator.state.fork import check_position, check_tensors
from orchestrator.state.lease import Fence
from orchestrator.state.memory import Memory
from orchestrator.state.packed import Progress
from orchestrator.state.restore import Restored, restore
from orchestrator.state.saver import BackgroundSaver
from orchestrator.state.storage import Storage
from orchestrator.tally import Tally, now_ms
from orchestrator.training import loop
from orchestrator.training.determinism import deterministic
from orchestrator.training.evaluate import EvalSums, evaluate
from orchestrator.training.models.resnet import build
from orchestrator.training.models.weights import load_weights, read_weights
from orchestrator.training.step import TrainStep
from pipelines.augment import pca_shift
from pipelines.batches import Batch, EvalBatches, TrainBatches
from pipelines.dali import resolve_decode
from pipelines.dataset import open_dataset
from pipelines.errors import DataError
from pipelines.quarantine import Quarantine, allowed


@dataclass(frozen=True)
class Job:
    """What a worker is told; small and picklable."""

    config: RunConfig
    resume: str | None = None  # name of the checkpoint to go on from
    dataset_digest: str = ""  # of the dataset that was admitted; "" = any
    run_id: str = ""  # names the run's copies in memory; "" = none are kept
    fence: Fence | None = None  # None: there is no driver, and no rival
    label: str = ""  # what the run is called where its counts are shown; "" = as its name is


BEGINNING = Progress(step=0, epoch=0, digest=0, sums={}, total={}, curve=[], bad=0, seconds=0.0)


def train(job: Job, context: Context) -> dict[str, Any]:
    """Trains from the job's checkpoint to the end, or to a stop. Every rank returns the same summary.

    Raises DataError for bad data, TrainingError for a loss that is not finite.
    """
    with ExitStack() as stack:
        return Worker(job, context, stack).run()


class Worker:
    """The parts of one worker, alive for one attempt."""

    def __init__(self, job: Job, context: Context, stack: ExitStack) -> None:
        self.config, self.context = job.config, context
        deterministic(job.config.train.deterministic)
        self.dataset = open_dataset(job.config.data.root, job.config.data.endpoint)
        if job.dataset_digest not in ("", self.dataset.digest):
            raise DataError(f"the dataset in {self.dataset.place} is not what it was when the run was submitted")
        self.plan = make_plan(job.config, counts_of(self.dataset))
        self.lanes = lanes_of(context.rank, context.world_size, job.config.data.lanes)
        self.decode = resolve_decode(job.config.data.decode, context.device.type == "cuda")
        self.memory = self._open_memory(job)
        owner = Owner(job.fence.number, job.fence.attempt, job.fence.check) if job.fence else Owner()
        self.checkpoints = Checkpoints(Storage(job.config.folder()), job.config.train.keep, owner=owner)
        self.saver = BackgroundSaver(self.checkpoints, self.memory, self._say_where)
        stack.callback(self.saver.close)
        restored = self._restore(job)
        progress = restored.checkpoint.progress if restored else BEGINNING
        self.feed = training_feed(job.config, self.dataset, self.plan, context, progress.step)
        stack.callback(self.feed.close)
        self.reader = self.feed.readers
        images = len(self.lanes) * self.plan.micro_batch
        self.odometer = Odometer(context, job.label or job.config.name, images, self.feed.counts)
        self.quarantine = {name: self._quarantine(name) for name in self.reader}
        self.step = self._build_step()
        if restored:
            self._load(restored)
        self.tally = Tally(replace(progress, told=[]) if restored and restored.forked else progress)
        self.rhythm = Rhythm(
            job.config.train.checkpoint_steps,
            60 * job.config.train.checkpoint_minutes,
            job.config.train.memory_seconds if job.run_id else 0,
        )
        self.stack = stack
        self._watch_node()
        self._introduce(restored.source if restored else "")

    def run(self) -> dict[str, Any]:
        """The loop, and who hears of it."""
        steps, every = self.plan.steps_per_epoch, self.config.tracking.log_steps
        if self.tally.unclosed(steps) and not self._end_epoch(Ask.NOTHING):
            return self._summary("stopped")
        for done in self._steps() if self.tally.step < self.last else ():
            self.tally.add(done)
            self.odometer.add(done)
            self.feed.at(done.global_step)
            ends_epoch = done.step == steps - 1
            wanted = self.rhythm.after(self.tally.step, ends_epoch, done.asked)
            if ends_epoch or self.tally.step % every == 0:
                self._report(done)
            if ends_epoch:
                if not self._end_epoch(wanted):
                    return self._summary("stopped")
            elif wanted:
                self._keep(wanted)
            if Ask.STOP in wanted and self.tally.step < self.last:
                return self._summary("stopped")
        if self.last < self.plan.steps:
            return self._summary("stopped", f"train.stop_after = {self.config.train.stop_after}")
        return self._summary("finished")

    @property
    def last(self) -> int:
        """Global steps that this run does."""
        return min(self.plan.steps, self.config.train.stop_after * self.plan.steps_per_epoch or self.plan.steps)

    def _steps(self) -> Iterator[loop.StepDone]:
        start, batches = self.tally.step, self._batches()
        self.stack.callback(batches.close)
        self.stack.callback(self.feed.cancel)  # before that: what waits for data does not hold up the end
        return loop.train(
            self.step,
            batches,
            learning_rate(self.config, self.plan.steps_per_epoch),
            steps_per_epoch=self.plan.steps_per_epoch,
            start=start,
            stop=self.last,
            request=self._request,
            colour=self._colour,
        )

    def _request(self) -> float:
        """Rank 0 asks, so that the clocks of the others do not matter."""
        return float(self.rhythm.ask(self.context.stop_asked(self.tally.step))) if self.context.rank == 0 else 0.0

    def _colour(self, batch: Batch) -> torch.Tensor | None:
        """The paper's PCA colour noise, keyed by sample as the crops are; None where it is off."""
        std = self.config.data.pca_colour
        if not std:
            return None
        shift = pca_shift(self.config.train.seed, batch.epoch, batch.ids, std)
        return torch.from_numpy(shift).to(self.context.device, non_blocking=True)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _build_step(self) -> TrainStep:
        data, optim, train = self.config.data, self.config.optim, self.config.train
        model = build(self.config.model.arch(self.plan.classes), seed=train.seed)
        if self.config.model.init:
            note = load_weights(model, read_weights(self.config.model.init))
            self._say(f"weights of {self.config.model.init}: {note}")
        return TrainStep(
            model,
            lanes=len(self.lanes),
            total_lanes=data.lanes,
            micro_batch=self.plan.micro_batch,
            lanes_per_pass=train.lanes_per_pass,
            world_size=self.context.world_size,
            reduce=train.reduce,
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
            decay_norm=optim.decay_norm,
            label_smoothing=optim.label_smoothing,
            clip_norm=optim.clip_norm,
            precision=train.precision,
            mean=data.mean,
            std=data.std,
            channels_last=train.channels_last,
            compile=train.compile,
            device=self.context.device,
        )

    def _batches(self) -> TrainBatches:
        return TrainBatches(
            self.reader["train"],
            self.plan.order,
            self.plan.augment,
            lanes=self.lanes,
            seed=self.config.train.seed,
            start=self.tally.step,
            stop=self.last,
            device=self.context.device,
            decode=self.decode,
            threads=threads_of(self.config),
            prefetch=self.config.data.prefetch,
            quarantine=self.quarantine["train"],
        )

    def _eval_batches(self) -> EvalBatches:
        data = self.config.data
        ids = eval_ids(self.context.rank, self.context.world_size, self.plan.val_samples)
        return EvalBatches(
            self.reader["val"],
            ids,
            resize=data.eval_resize,
            size=data.eval_size,
            batch_size=data.eval_batch,
            device=self.context.device,
            decode=self.decode,
            threads=threads_of(self.config),
            quarantine=self.quarantine["val"],
        )

    def _quarantine(self, split: str) -> Quarantine:
        limit = allowed(self.config.data.max_bad, self.dataset.splits[split].samples)
        return Quarantine(limit, lambda bad: self.context.send([bad_record(bad, split)]))

    # -- state ---------------------------------------------------------------------------------------------------

    def _open_memory(self, job: Job) -> Memory | None:
        """Of one rank a node; the others have the same state."""
        if not (job.run_id and job.config.train.memory_seconds and self._speaks_for_node):
            return None
        memory = Memory(job.run_id, owner=(job.fence.number, job.fence.attempt) if job.fence else (0, 0))
        memory.sweep()
        return memory

    def _restore(self, job: Job) -> Restored | None:
        """What the run goes on from; None at its beginning."""
        fork = job.config.train.fork
        restored = restore(self.checkpoints, self.memory, job.resume, self.context, fork)
        if restored and restored.forked:
            check_position(fork, restored.checkpoint.progress, self.plan)
        return restored

    def _load(self, restored: Restored) -> None:
        """Into the step."""
        if restored.forked:
            check_tensors(self.config.train.fork, restored.checkpoint.tensors, self.step.model)
        self.step.load_state_dict(restored.checkpoint.tensors)

    def _keep(self, wanted: Ask) -> None:
        """The state into storage, by rank 0, and into memory, by one rank a node. All ranks call it."""
        with self.odometer.timing("checkpoint"):
            self.tally.fetch()
            progress = self.tally.progress(self.plan.steps_per_epoch, self._sum)
            if Ask.CHECKPOINT in wanted and self.context.rank == 0:
                self.saver.save(self.step.state_dict(), progress, self._saved)
            elif self.memory:
                self.saver.copy(self.step.state_dict(), progress)

    def _saved(self, name: str) -> None:
        self.context.send([{"kind": "checkpoint", "name": name, "step": step_of(name)}])

    def _sum(self, values: list[int]) -> list[int]:
        """Integers summed over the ranks, modulo 2**64: the order does not matter."""
        if self.context.world_size == 1:
            return values
        signed = torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], device=self.context.device)
        dist.all_reduce(signed)
        return [v % 2**64 for v in signed.tolist()]

    @property
    def _speaks_for_node(self) -> bool:
        return self.context.rank == self.context.node_ranks[0]

    # -- words ---------------------------------------------------------------------------------------------------

    def _report(self, done: loop.StepDone) -> None:
        """One point of the training curves, from rank 0; what was fetched, from each."""
        record = self.tally.tell(self.tally.point(done, self.plan, self.config.train.global_batch))
        records: list[Record] = [record] if self.context.rank == 0 else []
        if records := records + self.feed.news():
            self.context.send(records)

    def _end_epoch(self, wanted: Ask) -> bool:
        """Evaluates, tells and saves; False where a stop came first. Then the epoch is saved as it is, and whoever
        goes on evaluates: an evaluation may take longer than a stop has time."""
        epoch = self.tally.step // self.plan.steps_per_epoch - 1
        due = self.tally.step == self.last or (epoch + 1) % self.config.train.eval_epochs == 0
        sums = None
        if due:
            if Ask.STOP not in wanted and self.rhythm.copies:
                self._keep(Ask.COPY)  # if this group dies now, the next one has only to evaluate
            sums = None if Ask.STOP in wanted else self._evaluate()
            if sums is None:
                self._keep(Ask.STOP | Ask.CHECKPOINT)
                return False
        record = self.tally.close_epoch(epoch, sums)
        told = {"kind": "epoch", "global_step": self.tally.step, "time_ms": now_ms(), **record, **self.tally.best()}
        self.tally.tell(told)
        if self.context.rank == 0:
            self.context.send([*self._classes(sums), told])
        self._keep(wanted | Ask.CHECKPOINT)
        return True

    def _classes(self, sums: EvalSums | None) -> list[Record]:
        """Of the run's last evaluation: images of each class, and how many of them were right."""
        if sums is None or self.tally.step < self.last:
            return []
        images, right = list(sums.class_images), list(sums.class_right)
        return [{"kind": "classes", "global_step": self.tally.step, "images": images, "right": right}]

    def _evaluate(self) -> EvalSums | None:
        """None where some rank was asked to stop meanwhile."""
        data, train, stopped = self.config.data, self.config.train, False

        def goes_on(_: object) -> bool:
            nonlocal stopped
            stopped = stopped or self.context.stop_asked(self.tally.step)
            return not stopped

        with self.odometer.timing("evaluation"), self._eval_batches() as batches:
            sums = evaluate(
                self.step.model,
                takewhile(goes_on, batches),
                mean=data.mean,
                std=data.std,
                precision=train.precision,
                device=self.context.device,
                channels_last=train.channels_last,
                batch_size=data.eval_batch,
                classes=self.plan.classes,
            )
        if any(self._sum([int(stopped)])):
            return None
        sums = sums.all_reduce()
        if sums.count != self.plan.val_samples:
            raise DataError(f"evaluation counted {sums.count} of {self.plan.val_samples} validation images")
        return sums

    def _summary(self, status: str, reason: str | None = None) -> dict[str, Any]:
        self.saver.wait()
        self._sum([0])  # rank 0 comes to it when storage has the state, and only then the copies are no longer needed
        if self.memory:
            self.memory.clear()
        if news := self.feed.news():
            self.context.send(news)
        self.odometer.tell()
        return {
            "status": status,
            "reason": reason,
            "steps": self.tally.step,
            "epochs": self.tally.closed,
            "weights_sha256": weights_sha256(self.step.model.state_dict()),
            **self.tally.summary(),
        }

    def _watch_node(self) -> None:
        """What the node is busy with, from one rank a node."""
        every = self.config.tracking.system_seconds
        if every and self._speaks_for_node:
            gpus = self.context.device.type == "cuda"
            sensors = Sensors(every, lambda record: self.context.send([record]), self._say, gpus=gpus)
            self.stack.callback(sensors.close)

    def _introduce(self, source: str) -> None:
        """What the group works on, and what it goes on from."""
        decode = {"kind": "decode", "where": self.decode, "device": self.context.device.type}
        restored = {"kind": "restored", "global_step": self.tally.step, "source": source}
        again = {"kind": "again", "records": self.tally.told}
        if self.context.rank == 0:
            self.context.send([decode, restored, again])

    def _say(self, text: str) -> None:
        if self.context.rank == 0:
            self.context.send([{"kind": "say", "text": text}])

    def _say_where(self, text: str) -> None:
        """From any rank."""
        self.context.send([{"kind": "say", "text": f"{socket.gethostname()}: {text}"}])
