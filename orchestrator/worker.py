"""What each worker does: builds the parts, restores, loops. The one place where everything meets.

    dataset.json -> plan -> order -> reader -> DALI -> Batch -> step -> StepStats -> tally -> checkpoint, records

Nothing here knows Ray or MLflow: a worker sees a Context.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.config import RunConfig
from orchestrator.context import Context, Record
from orchestrator.feed import threads_of, training_feed
from orchestrator.plan import counts_of, eval_ids, lanes_of, learning_rate, make_plan
from orchestrator.state.checkpoints import BackgroundSaver, Checkpoints, Progress, step_of, weights_sha256
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
from pipelines.errors import DataError, TrainingError
from pipelines.quarantine import BadSample, Quarantine, allowed


@dataclass(frozen=True)
class Job:
    """What a worker is told; small and picklable."""

    config: RunConfig
    resume: str | None = None  # name of the checkpoint to go on from
    dataset_digest: str = ""  # of the dataset that was admitted; "" = any


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
        self.checkpoints = Checkpoints(Storage(job.config.folder()), job.config.train.keep)
        self.saver = BackgroundSaver(self.checkpoints)
        stack.callback(self.saver.close)
        self.feed = training_feed(
            job.config, self.dataset, self.plan, context, step_of(job.resume) if job.resume else 0
        )
        stack.callback(self.feed.close)
        self.reader = self.feed.readers
        self.quarantine = {name: self._quarantine(name) for name in self.reader}
        self.step = self._build_step()
        self.tally = Tally(self._restore(job.resume))
        if context.rank == 0:
            context.send([{"kind": "decode", "where": self.decode, "device": context.device.type}])
        self.stack = stack

    def run(self) -> dict[str, Any]:
        """The loop, and who hears of it."""
        steps = self.plan.steps_per_epoch
        for done in self._steps():
            self.tally.add(done)
            self.feed.at(done.global_step)
            ends_epoch = done.step == steps - 1
            saves = ends_epoch or done.asked or self._checkpoint_due(done.global_step + 1)
            if saves or self.tally.due(self.config.tracking.log_steps):
                self._report(done)
            if ends_epoch:
                self._end_epoch(done.epoch)
            if saves:
                self._save()
            if done.asked and done.global_step + 1 < self.plan.steps:
                return self._summary("stopped")
        return self._summary("finished")

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
            stop=self.plan.steps,
            request=lambda: float(self.context.stop_asked()),
            colour=self._colour,
        )

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
            stop=self.plan.steps,
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

    def _restore(self, name: str | None) -> Progress:
        if name is None:
            return Progress(step=0, epoch=0, digest=0, sums={}, total={}, curve=[], bad=0, seconds=0.0)
        found = self.checkpoints.load(name)
        if found is None:
            raise TrainingError(f"checkpoint {name} cannot be read on rank {self.context.rank}")
        self.step.load_state_dict(found.tensors)
        return found.progress

    def _checkpoint_due(self, step: int) -> bool:
        every = self.config.train.checkpoint_steps
        return bool(every) and step % every == 0

    def _save(self) -> None:
        progress = self.tally.progress(self.plan.steps_per_epoch, self._sum)
        if self.context.rank == 0:
            self.saver.save(self.step.state_dict(), progress, self._saved)

    def _saved(self, name: str) -> None:
        self.context.send([{"kind": "checkpoint", "name": name, "step": step_of(name)}])

    def _sum(self, values: list[int]) -> list[int]:
        """Integers summed over the ranks, modulo 2**64: the order does not matter."""
        if self.context.world_size == 1:
            return values
        signed = torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], device=self.context.device)
        dist.all_reduce(signed)
        return [v % 2**64 for v in signed.tolist()]

    # -- words ---------------------------------------------------------------------------------------------------

    def _report(self, done: loop.StepDone) -> None:
        """One point of the training curves, from rank 0; what was fetched, from each."""
        record = self.tally.flush(done, self.plan, self.config.train.global_batch)
        records: list[Record] = [record] if self.context.rank == 0 else []
        if records := records + self.feed.news():
            self.context.send(records)

    def _end_epoch(self, epoch: int) -> None:
        every, last = self.config.train.eval_epochs, epoch + 1 == self.plan.epochs
        sums = self._evaluate() if last or (epoch + 1) % every == 0 else None
        record = self.tally.close_epoch(epoch, sums)
        if self.context.rank == 0:
            self.context.send(
                [{"kind": "epoch", "global_step": self.tally.step, "time_ms": now_ms(), **record, **self.tally.best()}]
            )

    def _evaluate(self) -> EvalSums:
        data, train = self.config.data, self.config.train
        with self._eval_batches() as batches:
            sums = evaluate(
                self.step.model,
                batches,
                mean=data.mean,
                std=data.std,
                precision=train.precision,
                device=self.context.device,
                channels_last=train.channels_last,
                batch_size=data.eval_batch,
            ).all_reduce()
        if sums.count != self.plan.val_samples:
            raise DataError(f"evaluation counted {sums.count} of {self.plan.val_samples} validation images")
        return sums

    def _summary(self, status: str) -> dict[str, Any]:
        self.saver.wait()
        if news := self.feed.news():
            self.context.send(news)
        return {
            "status": status,
            "steps": self.tally.step,
            "epochs": self.tally.step // self.plan.steps_per_epoch,
            "weights_sha256": weights_sha256(self.step.model.state_dict()),
            **self.tally.summary(),
        }

    def _say(self, text: str) -> None:
        if self.context.rank == 0:
            self.context.send([{"kind": "say", "text": text}])


def bad_record(bad: BadSample, split: str) -> Record:
    """A bad sample as a record: of each only the first, from any thread; the driver drops what it knows."""
    return {"kind": "bad", "split": split, **asdict(bad)}
