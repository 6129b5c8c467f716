"""BatchNorm by lane: several lanes share one forward pass, each is normalised with its own statistics.

In training a layer keeps no average of its own. A pass leaves every lane's mean and unbiased variance (momentum 1: a
constant, so that torch.compile sees one graph); the step adds them over all lanes of all ranks and moves the running
averages once. So all ranks hold the same bits after every step, however many lanes each one plays.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LaneBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` (same state-dict names, same evaluation) whose training statistics belong to one lane.

    How the lanes lie in a batch of lanes x micro_batch rows is told by `set_lanes`, before the first training pass:

    interleaved: sample i of lane l is row i * lanes + l. A contiguous NCHW batch is then, without moving a byte, a
        batch of micro_batch images with lanes x C channels, and one ordinary kernel does all lanes. Costs nothing.
    lane-major (else): sample i of lane l is row l * micro_batch + i, for channels_last tensors, whose channels cannot
        be joined like that. One kernel a lane, and one more copy of the activations each way where lanes > 1.
    """

    lane_mean: Tensor  # [lanes * C], lane after lane: what the last training pass saw
    lane_var: Tensor  # [lanes * C], unbiased

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.lanes = 1
        self.interleaved = True
        self.reserve(1)

    def reserve(self, lanes: int) -> None:
        """Make room for the statistics of `lanes` lanes, beside the weight. Not buffers: DDP must not compare them."""
        weight = self.weight
        self.lane_mean = torch.zeros(lanes * self.num_features, device=weight.device, dtype=weight.dtype)
        self.lane_var = torch.zeros_like(self.lane_mean)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(means, unbiased variances) of the last training pass, each [lanes, C]; overwritten by the next pass."""
        n = self.lanes * self.num_features
        shape = (self.lanes, self.num_features)
        return self.lane_mean[:n].view(shape), self.lane_var[:n].view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, C, H, W] -> the same shape. Training needs more than one value a lane and channel."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.lanes == 1:
            return self._normalise(x, 0, 1)
        if self.interleaved:
            joined = x.view(x.shape[0] // self.lanes, self.lanes * x.shape[1], *x.shape[2:])  # [mb, lanes * C, H, W]
            return self._normalise(joined, 0, self.lanes).view(x.shape)
        return torch.cat([self._normalise(part, i, 1) for i, part in enumerate(x.chunk(self.lanes))])

    def _normalise(self, x: Tensor, first: int, lanes: int) -> Tensor:
        """x: [mb, lanes * C, H, W] of the lanes from `first` on; leaves their statistics."""
        part = slice(first * self.num_features, (first + lanes) * self.num_features)
        weight, bias = (self.weight, self.bias) if lanes == 1 else (self.weight.repeat(lanes), self.bias.repeat(lanes))
        return F.batch_norm(x, self.lane_mean[part], self.lane_var[part], weight, bias, True, 1.0, self.eps)


def norms(model: nn.Module) -> list[LaneBatchNorm2d]:
    """Every LaneBatchNorm2d of the model, in the model's order."""
    return [module for module in model.modules() if isinstance(module, LaneBatchNorm2d)]


def set_lanes(layers: Sequence[LaneBatchNorm2d], lanes: int, *, interleaved: bool) -> None:
    """Say how many lanes the next training passes hold, and how they lie in the batch."""
    for layer in layers:
        room, weight = layer.lane_mean, layer.weight
        if room.numel() < lanes * weight.numel() or (room.device, room.dtype) != (weight.device, weight.dtype):
            layer.reserve(lanes)
        layer.lanes, layer.interleaved = lanes, interleaved


def lane_sums(layers: Sequence[LaneBatchNorm2d]) -> Tensor:
    """Sums over the lanes of the last pass: [2 * all channels], the means of every layer, then the variances."""
    means, variances = zip(*(layer.statistics() for layer in layers), strict=True)
    return torch.cat([torch.cat(means, 1).sum(0), torch.cat(variances, 1).sum(0)])


class RunningAverages:
    """Moves the running averages of all layers, once a step, with statistics averaged over all lanes.

    running = (1 - momentum) * running + momentum * statistics; `num_batches_tracked` counts steps.
    """

    def __init__(self, layers: Sequence[LaneBatchNorm2d], momentum: float = 0.1) -> None:
        self._momentum = momentum
        self._averages = [*_present(layer.running_mean for layer in layers)]
        self._averages += _present(layer.running_var for layer in layers)
        self._counts = [*_present(layer.num_batches_tracked for layer in layers)]
        self._sizes = [average.numel() for average in self._averages]

    def move(self, statistics: Tensor) -> None:
        """statistics: as `lane_sums` lays them out, divided by the number of lanes."""
        torch._foreach_lerp_(self._averages, torch.split(statistics, self._sizes), self._momentum)
        torch._foreach_add_(self._counts, 1)


def _present(tensors: Iterator[Tensor | None]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor is not None)
