"""One optimiser step over the global batch, of which this rank plays some lanes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orchestrator.training.norm import LaneBatchNorm2d, RunningAverages, lane_sums, norms, set_lanes
from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from orchestrator.training.reduce import FastReduce, Way, reduction
from pipelines.errors import TrainingError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepStats:
    """What a step saw, as scalars on the device (reading one waits for the device); equal on all ranks.

    loss: mean over the global batch, label smoothing included. top1, top5, samples: counts over the global batch; top5
    means top-min(5, classes). grad_norm: of the mean gradient, before clipping. request: sum of what the ranks asked.
    """

    loss: Tensor
    top1: Tensor
    top5: Tensor
    samples: Tensor
    grad_norm: Tensor
    request: Tensor


class TrainStep:
    """Forward, backward, sum over lanes, optimiser, running averages: everything between a batch and new weights.

    model: as `models.resnet.build` makes it, its BatchNorms by lane; moved to `device` here.
    lanes, total_lanes: lanes of this rank, and of all `world_size` ranks. With more than one rank the default process
        group must be there, and every rank must build its step at the same time with equal weights.
    micro_batch: samples of one lane. lanes_per_pass: lanes that run fused in one forward and backward; 0 means all
        (with reduce "exact": one).
    reduce: how lanes are summed, see `reduce`.
    momentum, nesterov, weight_decay: as torch.optim.SGD. decay_norm: whether norms and biases decay too.
    clip_norm: largest length of the gradient, 0 for no limit. mean, std: of RGB in 0..1.
    compile: run the net through torch.compile; the first step then takes minutes.

    ValueError for numbers that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lanes: int,
        total_lanes: int,
        micro_batch: int,
        lanes_per_pass: int = 0,
        world_size: int = 1,
        reduce: Way = "fast",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        decay_norm: bool = True,
        label_smoothing: float = 0.0,
        clip_norm: float = 0.0,
        precision: Precision = "fp32",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        channels_last: bool = False,
        compile: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.passes = _passes(lanes, total_lanes, lanes_per_pass, world_size, one=reduce == "exact")
        device = torch.device(device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=layout).train()  # type: ignore[call-overload]
        forward = cast(nn.Module, torch.compile(self.model)) if compile else self.model
        self.reduction = reduction(reduce, self.model, forward, total_lanes, world_size)
        self.optimizer = torch.optim.SGD(
            _groups(self.model, weight_decay, decay_norm), lr=0.0, momentum=momentum, nesterov=nesterov, fused=True
        )
        self._pixels = Pixels(mean, std, device, interleaved=not channels_last)
        self._norms = norms(self.model)
        self._averages = RunningAverages(self._norms)
        self._total_lanes, self._micro_batch = total_lanes, micro_batch
        self._smoothing, self._clip_norm, self._precision = label_smoothing, clip_norm, precision
        self._device = device
        set_lanes(self._norms, max(self.passes), interleaved=not channels_last)
        if isinstance(self.reduction, FastReduce) and world_size > 1:
            self._settle_buckets()

    def __call__(
        self, images: Tensor, labels: Tensor, lr: float, request: float = 0.0, colour: Tensor | None = None
    ) -> StepStats:
        """One step with learning rate `lr`.

        images: uint8 [n, S, S, 3] on the device, n = lanes * micro_batch, lane after lane; labels: int64 [n].
        request: what this rank asks all ranks (0 for nothing); the sum comes back as `StepStats.request`.
        colour: float32 [n, 3] added to the images in units of 0..1, or None.
        """
        if len(images) != sum(self.passes) * self._micro_batch:
            raise ValueError(f"{len(images)} images for {sum(self.passes)} lanes of {self._micro_batch}")
        self.optimizer.zero_grad(set_to_none=True)
        first = 0
        for i, lanes in enumerate(self.passes):
            rows = slice(first, first + lanes * self._micro_batch)
            shift = None if colour is None else colour[rows]
            ask = request if i == 0 else 0.0
            self._run(images[rows], labels[rows], shift, lanes, ask, last=i == len(self.passes) - 1)
            first = rows.stop
        return self._finish(self.reduction.finish(), lr)

    def _run(
        self, images: Tensor, labels: Tensor, colour: Tensor | None, lanes: int, ask: float, *, last: bool
    ) -> None:
        """Forward and backward of some lanes."""
        set_lanes(self._norms, lanes, interleaved=self._pixels.interleaved)
        x, labels = self._pixels(images, lanes, colour), self._pixels.rows(labels, lanes)
        with self.reduction.lanes(last):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                logits = self.reduction.forward(x)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels, label_smoothing=self._smoothing) * lanes  # sum of the lanes' means
            counts = [loss.new_full((), float(len(x))), loss.new_full((), ask)]  # filled there: no copy to the device
            seen = torch.stack([loss.detach(), *correct(logits.detach(), labels), *counts])
            self.reduction.add(torch.cat([lane_sums(self._norms), seen]), last)
            torch.autograd.backward(loss * self.reduction.scale)

    @torch.no_grad()
    def _finish(self, sums: Tensor, lr: float) -> StepStats:
        """Gradients are means over all lanes now, `sums` are sums over them."""
        self._averages.move(sums[:-5] / self._total_lanes)
        loss, top1, top5, samples, request = sums[-5:].clone().unbind()  # views would keep all of them
        grad_norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return StepStats(loss / self._total_lanes, top1, top5, samples, grad_norm, request)

    def _clip(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self._clip_norm, norm)
        return norm

    def _settle_buckets(self) -> None:
        """Two backward passes thrown away: DDP lays its buckets anew after its first synchronised one.

        Without them a resumed run adds three or more ranks' gradients in another order than the run it goes on with,
        and differs in the last bits. Nothing is left behind: no gradient, no statistic (the net keeps no average).
        """
        lanes = self.passes[-1]
        # 64 px: the smallest power of two at which even a micro-batch of one leaves each BatchNorm several values
        zeros = torch.zeros(lanes * self._micro_batch, 64, 64, 3, dtype=torch.uint8, device=self._device)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(2):
                self._run(zeros, zeros[:, 0, 0, 0].long(), None, lanes, 0.0, last=True)
                self.reduction.finish()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """{"model": the net's state, "momentum": by parameter name}: tensors only, and not copied."""
        named = self.model.named_parameters()
        buffers = {
            name: self.optimizer.state[p].get("momentum_buffer") for name, p in named if p in self.optimizer.state
        }
        return {"model": self.model.state_dict(), "momentum": {n: b for n, b in buffers.items() if b is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, on every rank alike; names and shapes must be this net's."""
        self.model.load_state_dict(state["model"])
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for name, momentum in state["momentum"].items():
            buffer = torch.empty_like(parameters[name]).copy_(momentum)
            self.optimizer.state[parameters[name]]["momentum_buffer"] = buffer


def correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(top-1, top-min(5, classes)) counts as float32 scalars; logits: [n, classes], labels: int64 [n]."""
    found = hits(logits, labels)
    return found[:, 0].sum(dtype=torch.float32), found.sum(dtype=torch.float32)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """bool [n, min(5, classes)]: whether the label is the likeliest class, or the next one, and so on."""
    return logits.topk(min(5, logits.shape[1])).indices == labels[:, None]


def check_finite(stats: StepStats, where: str = "") -> None:
    """TrainingError where the loss or the gradient is not a finite number; waits for the device."""
    loss, norm = float(stats.loss), float(stats.grad_norm)
    if not (torch.isfinite(stats.loss) and torch.isfinite(stats.grad_norm)):
        place = f" at {where}" if where else ""
        raise TrainingError(
            f"training diverged{place}: loss {loss:g}, gradient norm {norm:g}; lower optim.lr, or warm up for longer"
        )


def to_host(stats: Sequence[StepStats]) -> list[dict[str, float]]:
    """Many steps' numbers with one transfer: [{"loss", "top1", "top5", "samples", "grad_norm", "request"}, ...]."""
    if not stats:
        return []
    names = list(StepStats.__dataclass_fields__)
    values = torch.stack([torch.stack([getattr(s, name) for name in names]) for s in stats]).tolist()
    return [dict(zip(names, row, strict=True)) for row in values]


def _passes(lanes: int, total_lanes: int, per_pass: int, world_size: int, *, one: bool) -> tuple[int, ...]:
    """Lanes of each pass: (3, 3, 1) for 7 lanes, 3 a pass."""
    if not 1 <= lanes <= total_lanes - (world_size - 1):
        raise ValueError(f"{lanes} lanes of {total_lanes} for one of {world_size} ranks; each rank plays at least one")
    if world_size == 1 and lanes != total_lanes:
        raise ValueError(f"one rank plays {lanes} of {total_lanes} lanes; it must play all")
    if one and per_pass > 1:
        raise ValueError(f"lanes_per_pass is {per_pass}; reduce 'exact' runs lanes one by one: use 0 or 1")
    if per_pass < 0:
        raise ValueError(f"lanes_per_pass is {per_pass}; use 0 for all, or 1 and more")
    size = 1 if one else min(per_pass or lanes, lanes)
    full, rest = divmod(lanes, size)
    return (size,) * full + ((rest,) if rest else ())


def _groups(model: nn.Module, weight_decay: float, decay_norm: bool) -> list[dict[str, Any]]:
    """Optimiser groups; with decay_norm False the norms' weights and all biases do not decay (Goyal et al. 2017)."""
    if decay_norm:
        return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    still = {id(p) for module in model.modules() if isinstance(module, LaneBatchNorm2d) for p in module.parameters()}
    still |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    return [
        {"params": [p for p in model.parameters() if id(p) not in still], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) in still], "weight_decay": 0.0},
    ]
