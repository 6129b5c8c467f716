"""Summing over lanes: after a step every rank holds the mean of all lanes' gradients, and the sum of their statistics.

fast     DDP, overlapped with the backward pass. Same bits on the same number of workers, as far as the network's own
         sum is the same from call to call (gloo: yes; NCCL may pick another algorithm).
ordered  adds the ranks' sums in rank order, whatever the network does: same bits on any hosts, at the same number of
         workers. Moves as many bytes as a ring does, but nothing is overlapped.
exact    fixed point: same bits at any number of workers. Lanes run one by one, each lane's gradient is kept until the
         step's end (4 bytes x parameters x lanes of the rank), and 8 bytes a number travel instead of 4.

All three are used alike by the step: `lanes(last)` around each pass, `forward`, `add(statistics, last)` between the
forward and the backward, loss times `scale` backward, `finish()` once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Way = Literal["fast", "ordered", "exact"]


class Reduction(Protocol):
    """One way of summing. `scale` is what a pass's sum of its lanes' mean losses is multiplied with."""

    scale: float

    def forward(self, x: Tensor) -> Tensor: ...

    @contextmanager
    def lanes(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one pass; `last` is this rank's last pass of the step."""
        yield

    def add(self, statistics: Tensor, last: bool) -> None:
        """A pass's sums over its lanes (float32, one dimension), given before its backward pass."""

    def finish(self) -> Tensor:
        """The statistics summed over all lanes; now `.grad` holds the mean over all lanes."""


def reduction(way: Way, model: nn.Module, forward: nn.Module, total_lanes: int, world_size: int) -> Reduction:
    """The way of summing called `way`; `forward` is the model, or the model compiled. ValueError for another name.

    With more than one worker the default process group must be there.
    """
    if way == "fast":
        return FastReduce(forward, total_lanes, world_size)
    if way == "ordered":
        return OrderedReduce(model, forward, total_lanes, world_size)
    if way == "exact":
        return ExactReduce(model, forward, total_lanes, world_size)
    raise ValueError(f"reduce is {way!r}; allowed: fast, ordered, exact")


class FastReduce:
    """DDP: every rank synchronises once a step, in its last pass, however many lanes it plays."""

    def __init__(self, forward: nn.Module, total_lanes: int, world_size: int) -> None:
        # DDP divides by the number of ranks; the mean over lanes divides by the number of lanes.
        self.scale = world_size / total_lanes
        self._ddp: DistributedDataParallel | None = None
        if world_size > 1:
            # Buffers are ours: the step moves them alike on all ranks.
            self._ddp = DistributedDataParallel(forward, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self._forward = self._ddp or forward
        self._statistics: Tensor | None = None
        self._work: dist.Work | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    @contextmanager
    def lanes(self, last: bool) -> Iterator[None]:
        if self._ddp is None or last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def add(self, statistics: Tensor, last: bool) -> None:
        self._statistics = statistics if self._statistics is None else self._statistics.add_(statistics)
        if last and self._ddp is not None:  # travels while the last backward pass runs
            self._work = dist.all_reduce(self._statistics, async_op=True)

    def finish(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        statistics, self._statistics, self._work = self._statistics, None, None
        assert statistics is not None
        return statistics


class OrderedReduce:
    """Each rank adds one slice of all ranks' sums, in rank order, and hands its slice round."""

    def __init__(self, model: nn.Module, forward: nn.Module, total_lanes: int, world_size: int) -> None:
        self.scale = 1 / total_lanes
        self._parameters = _trained(model)
        self._world_size = world_size
        self.forward = forward
        self._statistics: Tensor | None = None

    @contextmanager
    def lanes(self, last: bool) -> Iterator[None]:
        yield

    def add(self, statistics: Tensor, last: bool) -> None:
        self._statistics = statistics if self._statistics is None else self._statistics.add_(statistics)

    def finish(self) -> Tensor:
        statistics, self._statistics = self._statistics, None
        assert statistics is not None
        if self._world_size == 1:
            return statistics
        total = self._sum(_flat([*_gradients(self._parameters), statistics]))
        _write_gradients(self._parameters, total)
        return total[-statistics.numel() :].clone()

    def _sum(self, values: Tensor) -> Tensor:
        """values: [n] of this rank -> [n], the sum over ranks in rank order."""
        share = -(-values.numel() // self._world_size)
        padded = torch.cat([values, values.new_zeros(share * self._world_size - values.numel())])
        received = torch.empty_like(padded)
        dist.all_to_all_single(received, padded)  # [rank, share]: everyone's numbers of this rank's slice
        parts = received.view(self._world_size, share)
        mine = parts[0].clone()
        for part in parts[1:]:
            mine += part
        dist.all_gather(list(padded.view(self._world_size, share)), mine)
        return padded[: values.numel()]


class ExactReduce:
    """Integers are added, which is associative: neither the ranks nor who plays which lane matters.

    For each tensor the largest magnitude over all lanes fixes a power of two, so that no sum over lanes overflows 62
    bits; values times that power are rounded to int64, added, divided back. A tensor with a value that is not finite
    becomes NaN as a whole, which `check_finite` finds.
    """

    scale = 1.0

    def __init__(self, model: nn.Module, forward: nn.Module, total_lanes: int, world_size: int) -> None:
        self._parameters = _trained(model)
        self._total_lanes = total_lanes
        self._world_size = world_size
        self.forward = forward
        self._lanes: list[Tensor] = []  # [gradients and statistics] of each lane so far
        self._statistics: Tensor | None = None

    @contextmanager
    def lanes(self, last: bool) -> Iterator[None]:
        yield
        assert self._statistics is not None
        self._lanes.append(_flat([*_gradients(self._parameters), self._statistics]))
        if not last:
            for parameter in self._parameters:
                parameter.grad = None

    def add(self, statistics: Tensor, last: bool) -> None:
        self._statistics = statistics

    def finish(self) -> Tensor:
        assert self._statistics is not None
        # Every statistic has a scale of its own: a mean near 0 must not share one with a count.
        sizes = [parameter.numel() for parameter in self._parameters] + [1] * self._statistics.numel()
        total = fixed_point_sum(torch.stack(self._lanes), sizes, self._total_lanes, self._world_size)
        statistics = total[-self._statistics.numel() :].clone()
        self._lanes, self._statistics = [], None
        _write_gradients(self._parameters, total.div_(self._total_lanes))
        return statistics


def fixed_point_sum(lanes: Tensor, sizes: Sequence[int], total_lanes: int, world_size: int) -> Tensor:
    """The sum over all lanes of all ranks: the same bits however the lanes are dealt.

    lanes: float32 [lanes of this rank, n]; sizes: lengths of the tensors that share a scale, n in all.
    Returns float32 [n]. Finer than a float32 sum, except for values 2**-35 and less of their tensor's largest.
    """
    segments = torch.repeat_interleave(torch.tensor(sizes, device=lanes.device), output_size=lanes.shape[1])
    largest = lanes.abs().amax(0).nan_to_num_(torch.inf, torch.inf)  # a maximum may lose a NaN, never an infinity
    highest = lanes.new_zeros(len(sizes)).scatter_reduce(0, segments, largest, "amax")
    if world_size > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    bits = 62 - (total_lanes - 1).bit_length()
    exponent = bits - torch.frexp(highest).exponent.long()  # |value| * 2**exponent <= 2**bits
    up = _power_of_two(exponent)[segments]
    total = torch.zeros(lanes.shape[1], dtype=torch.int64, device=lanes.device)
    for lane in lanes:
        total += (lane.double() * up).nan_to_num_(0, 0, 0).round_().long()
    if world_size > 1:
        dist.all_reduce(total)
    result = total.double().mul_(_power_of_two(-exponent)[segments])
    return torch.where(highest.isfinite()[segments], result, torch.nan).float()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2.0 ** exponent as float64, from its bits: pow need not be exact on every device. For -1022 .. 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters), "a parameter took no part in the loss"
    return gradients


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _write_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    parts = torch.split(flat[: sum(sizes)], sizes)
    torch._foreach_copy_(
        _gradients(parameters), [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
    )
