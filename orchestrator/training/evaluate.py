"""Exact evaluation: every validation image counted once, in integers, at any number of workers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from orchestrator.training.pixels import Pixels
from orchestrator.training.step import Precision, hits

DIGEST = 5  # where EvalSums has it
LOSS_UNIT = 2.0**-20  # of the fixed-point loss: a million images of loss 100 fill 47 of 63 bits


class EvalBatch(Protocol):
    """What evaluation needs of a batch."""

    images: Tensor  # uint8 [n, S, S, 3] on the device
    labels: Tensor  # int64 [n] on the device
    digest: int  # 0 .. 2**64 - 1


@dataclass(frozen=True)
class EvalSums:
    """Sums over images, all integers, so that any split over ranks gives the same numbers.

    loss_fixed: per-image cross-entropy (no smoothing) rounded to 2**-20 nat, in that unit. nonfinite: images whose loss
    is no finite number (left out of loss_fixed). digest: sum of the batches' digests modulo 2**64. class_images and
    class_right: images of each class, and those of them whose likeliest class is their own; empty where not asked for.
    """

    top1: int = 0
    top5: int = 0
    count: int = 0
    loss_fixed: int = 0
    nonfinite: int = 0
    digest: int = 0
    class_images: tuple[int, ...] = ()
    class_right: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """Mean over the images in nat; nan without images, or with one whose loss is not finite."""
        return self.loss_fixed * LOSS_UNIT / self.count if self.count and not self.nonfinite else float("nan")

    @property
    def top1_share(self) -> float:
        """Share of images, 0..1; nan without images."""
        return self.top1 / self.count if self.count else float("nan")

    @property
    def top5_share(self) -> float:
        return self.top5 / self.count if self.count else float("nan")

    def __add__(self, other: "EvalSums") -> "EvalSums":
        return _sums(a + b for a, b in zip_longest(self._numbers, other._numbers, fillvalue=0))

    def all_reduce(self) -> "EvalSums":
        """The sum over all ranks, on every rank; itself where there is no process group."""
        if not dist.is_initialized():
            return self
        values = self._numbers
        values[DIGEST] -= self.digest >> 63 << 64  # int64 wraps as the digest does
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.int64, device=device)
        dist.all_reduce(total)
        return _sums(total.tolist())

    @property
    def _numbers(self) -> list[int]:
        own = [self.top1, self.top5, self.count, self.loss_fixed, self.nonfinite, self.digest]
        return [*own, *self.class_images, *self.class_right]


def _sums(numbers: Iterable[int]) -> EvalSums:
    """In the order of the fields; the digest may have left its range."""
    top1, top5, count, loss, nonfinite, digest, *by_class = numbers
    images, right = by_class[: len(by_class) // 2], by_class[len(by_class) // 2 :]
    return EvalSums(top1, top5, count, loss, nonfinite, digest % 2**64, tuple(images), tuple(right))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    batch_size: int = 0,
    classes: int = 0,
) -> EvalSums:
    """Sums over this rank's batches, with the running averages; the model is left in the mode it was in.

    batch_size: fill a short batch up to so many images before the net, and count none of the filling. Kernels choose
    their arithmetic by the batch's size, so with it an image's loss has the same bits whichever batch it falls in.
    classes: count by class, too, for so many; a scatter on the device, and no wait for it.
    """
    device = torch.device(device)
    pixels = Pixels(mean, std, device, interleaved=not channels_last)
    training = model.training
    model.eval()
    try:
        total = torch.zeros(5, dtype=torch.int64, device=device)
        by_class = torch.zeros(2, classes, dtype=torch.int64, device=device)
        digest = 0
        for batch in batches:
            n = len(batch.images)
            x = pixels(_filled(batch.images, batch_size), 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(x)
            logits = logits[:n].float()
            found = hits(logits, batch.labels)
            total += _count(logits, batch.labels, found)
            if classes:
                by_class.index_add_(1, batch.labels, torch.stack([torch.ones_like(batch.labels), found[:, 0].long()]))
            digest += batch.digest
        return _sums([*total.tolist(), digest, *by_class.flatten().tolist()])
    finally:
        model.train(training)


def _filled(images: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing > 0 else images


def _count(logits: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    """[top1, top5, count, fixed-point loss, non-finite losses] of one batch, int64."""
    loss = F.cross_entropy(logits, labels, reduction="none").double()
    finite = loss.isfinite()
    fixed = (loss.where(finite, 0.0) / LOSS_UNIT).round().long().sum()
    count = finite.new_tensor(len(labels), dtype=torch.int64)
    return torch.stack([found[:, 0].sum(), found.sum(), count, fixed, (~finite).sum()])
