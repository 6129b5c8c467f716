"""The sums of a run that continue over checkpoints, and what is told of them."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.context import Record
from orchestrator.plan import Plan
from orchestrator.state.packed import Progress
from orchestrator.training.evaluate import EvalSums
from orchestrator.training.loop import StepDone
from orchestrator.training.metrics import EpochSums
from orchestrator.training.step import StepStats, check_finite, to_host

TOLD = 32  # records that a checkpoint brings again: more than a driver can have missed, and 15 kB


class Tally:
    """The sums that continue over checkpoints. Everything but digest and bad samples is equal on all ranks.

    So are the points of the training curve: they end at multiples of log_steps and at epochs' ends, and their sums go
    through checkpoints, so a restart changes neither where they are nor what they say.
    """

    def __init__(self, start: Progress) -> None:
        self._start = start
        self.step = start.step
        self._interval, self._sums, self._total = _sums(start.interval), _sums(start.sums), _sums(start.total)
        self._curve = list(start.curve)
        self._digest, self._bad = 0, 0
        self._pending: list[StepStats] = []
        self._fetched = 0  # steps of this interval that this process did
        self._wait_s = self._busy_s = 0.0
        self._began = time.monotonic()
        self._images, self._train_s = 0, 0.0
        self._last: Progress | None = None
        self._told = deque(start.told, maxlen=TOLD)

    def add(self, done: StepDone) -> None:
        """One step; nothing is fetched from the device."""
        self._pending.append(done.stats)
        self._digest = (self._digest + done.digest) % 2**64
        self._bad += len(done.bad)
        self._wait_s, self._busy_s = self._wait_s + done.wait_s, self._busy_s + done.step_s
        self.step = done.global_step + 1

    def fetch(self) -> None:
        """Waits for the device and adds up what is pending. Raises TrainingError where it is not finite."""
        if not self._pending:
            return
        check_finite(self._pending[-1], f"step {self.step - 1}")
        for numbers in to_host(self._pending):
            for sums in (self._interval, self._sums, self._total):
                sums.add(**numbers)
        self._fetched += len(self._pending)
        self._pending = []

    def point(self, done: StepDone, plan: Plan, global_batch: int) -> Record:
        """Ends the interval: its mean as a record. Speeds are those of this process."""
        self.fetch()
        seconds, images = max(self._wait_s + self._busy_s, 1e-9), self._fetched * global_batch
        self._images, self._train_s = self._images + images, self._train_s + seconds
        rate = images / seconds
        record = {
            "kind": "progress",
            "time_ms": now_ms(),
            "global_step": self.step,
            "epoch": done.epoch,
            "step": done.step + 1,
            "steps_per_epoch": plan.steps_per_epoch,
            "epochs": plan.epochs,
            "lr": done.lr,
            "grad_norm": float(done.stats.grad_norm),
            "loss": self._interval.mean_loss,
            "top1": self._interval.top1_share,
            "top5": self._interval.top5_share,
            "images_per_s": rate,
            "data_wait": self._wait_s / seconds,
            "step_s": seconds / self._fetched,
            "left_s": (plan.steps - self.step) * global_batch / rate,
        }
        self._interval, self._fetched, self._wait_s, self._busy_s = EpochSums(), 0, 0.0, 0.0
        return record

    def tell(self, record: Record) -> Record:
        """The same record, kept for whoever goes on from here: a driver that was killed may not have heard it."""
        self._told.append(record)
        return record

    @property
    def told(self) -> list[Record]:
        """What was told last, oldest first."""
        return list(self._told)

    def unclosed(self, steps_per_epoch: int) -> bool:
        """Whether all steps of an epoch are done, and it was not evaluated and closed yet."""
        return self.step % steps_per_epoch == 0 and self._sums.steps > 0

    @property
    def closed(self) -> int:
        """Epochs that were closed: one that was not evaluated yet because of a stop is not."""
        return int(self._curve[-1]["epoch"]) if self._curve else 0

    def close_epoch(self, epoch: int, sums: EvalSums | None) -> dict[str, float]:
        """Ends the epoch's sums; returns the record for the curve."""
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "train_loss": self._sums.mean_loss,
            "train_top1": self._sums.top1_share,
        }
        if sums is not None:
            record |= {"val_loss": sums.loss, "val_top1": sums.top1_share, "val_top5": sums.top5_share}
            record |= {"val_samples": sums.count, "eval_digest": f"{sums.digest:016x}"}
        self._curve.append(record)
        self._sums = EpochSums()
        return record

    def best(self) -> dict[str, float]:
        """The best validation accuracy so far: from the curve, which goes on over restarts and submissions."""
        scores = [record["val_top1"] for record in self._curve if "val_top1" in record]
        return {"val_top1_best": max(scores)} if scores else {}

    def progress(self, steps_per_epoch: int, total: Callable[[list[int]], list[int]]) -> Progress:
        """The state for a checkpoint; `total` sums a list of integers over the ranks."""
        digest, bad = total([self._digest, self._bad])
        self._last = Progress(
            step=self.step,
            epoch=self.step // steps_per_epoch,
            digest=(self._start.digest + digest) % 2**64,
            interval=self._interval.to_dict(),
            sums=self._sums.to_dict(),
            total=self._total.to_dict(),
            curve=list(self._curve),
            bad=self._start.bad + bad,
            told=self.told,
            seconds=self._start.seconds + time.monotonic() - self._began,
        )
        return self._last

    def summary(self) -> dict[str, Any]:
        """For result.json; a run ends with a checkpoint, whose sums these are."""
        last = replace(self._last or self._start)
        return {
            "data_digest": f"{last.digest:016x}",
            "bad_samples": last.bad,
            "seconds": last.seconds,
            "curve": last.curve,
            "train_loss_mean": self._total.mean_loss,
            "images_per_second": self._images / self._train_s if self._train_s else None,
        }


def _sums(saved: dict[str, float]) -> EpochSums:
    return EpochSums.from_dict(saved) if saved else EpochSums()


def now_ms() -> int:
    return int(time.time() * 1000)
