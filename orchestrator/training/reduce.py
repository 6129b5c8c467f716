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

from orchestrator.training.fixed_point import FixedPointSum

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
        self._sent = self._received = torch.empty(0)  # kept between steps: fresh pages cost more than the sums

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
        self._sum_in_rank_order([*_gradients(self._parameters), statistics])
        _write_gradients(self._parameters, self._sent)
        end = sum(parameter.numel() for parameter in self._parameters) + statistics.numel()
        return self._sent[end - statistics.numel() : end].clone()

    def _sum_in_rank_order(self, tensors: Sequence[Tensor]) -> None:
        """Leaves the sums over ranks, one after the other, in `self._sent`."""
        n = sum(tensor.numel() for tensor in tensors)
        share = -(-n // self._world_size)
        if not self._sent.numel():
            self._sent = tensors[0].new_zeros(share * self._world_size)
            self._received = torch.empty_like(self._sent)
        _flatten(tensors, self._sent[:n])
        dist.all_to_all_single(self._received, self._sent)
        parts = self._received.view(self._world_size, share)  # everyone's numbers of this rank's slice
        for part in parts[1:]:
            parts[0].add_(part)
        dist.all_gather(list(self._sent.view(self._world_size, share)), parts[0])


class ExactReduce:
    """Integers are added, which is associative: neither the ranks nor who plays which lane matters."""

    scale = 1.0

    def __init__(self, model: nn.Module, forward: nn.Module, total_lanes: int, world_size: int) -> None:
        self._parameters = _trained(model)
        self._total_lanes = total_lanes
        self._world_size = world_size
        self.forward = forward
        self._buffers: list[Tensor] = []  # gradients and statistics of a lane each; kept between steps
        self._played = 0
        self._statistics: Tensor | None = None
        self._sum: FixedPointSum | None = None

    @contextmanager
    def lanes(self, last: bool) -> Iterator[None]:
        yield
        assert self._statistics is not None
        tensors = [*_gradients(self._parameters), self._statistics]
        if self._played == len(self._buffers):
            self._buffers.append(self._statistics.new_empty(sum(tensor.numel() for tensor in tensors)))
        _flatten(tensors, self._buffers[self._played])
        self._played += 1
        if not last:
            for parameter in self._parameters:
                parameter.grad = None

    def add(self, statistics: Tensor, last: bool) -> None:
        self._statistics = statistics

    def finish(self) -> Tensor:
        assert self._statistics is not None
        if self._sum is None:
            sizes = [parameter.numel() for parameter in self._parameters]
            self._sum = FixedPointSum(
                sizes, self._statistics.numel(), self._total_lanes, self._world_size, self._statistics.device
            )
        total = self._sum(self._buffers[: self._played])
        statistics = total[-self._statistics.numel() :].clone()
        self._played, self._statistics = 0, None
        _write_gradients(self._parameters, total.div_(self._total_lanes))
        return statistics


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters), "a parameter took no part in the loss"
    return gradients


def _flatten(tensors: Sequence[Tensor], out: Tensor) -> None:
    torch.cat([tensor.reshape(-1) for tensor in tensors], out=out)


def _write_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    parts = torch.split(flat[: sum(sizes)], sizes)
    torch._foreach_copy_(
        _gradients(parameters), [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
    )
