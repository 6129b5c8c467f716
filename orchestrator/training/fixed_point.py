"""A sum of floating-point numbers that gives the same bits in any order: they are added as integers."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 2**17  # numbers at a time on a CPU: float64 and int64 of so many stay in its cache


class FixedPointSum:
    """Adds the lanes of all ranks: equal bits however the lanes are dealt, and at any number of ranks.

    The largest magnitude of each tensor, over all lanes, fixes a power of two, so that no sum over lanes overflows 62
    bits; values times that power are rounded to int64, added, divided back. That is finer than a float32 sum, except
    for values below 2**-35 or so of their tensor's largest. A tensor with a value that is not finite becomes NaN as a
    whole.

    sizes: numbers in each tensor that shares a power. singles: how many numbers with a power of their own follow them.
    The buffers, 20 bytes a number, are kept from call to call.
    """

    def __init__(
        self, sizes: Sequence[int], singles: int, total_lanes: int, world_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self._sizes = list(sizes)
        self._world_size = world_size
        self._bits = 62 - (total_lanes - 1).bit_length()
        lengths = torch.tensor([*sizes, *[1] * singles], device=device)
        self._tensor_of = torch.repeat_interleave(lengths)  # [n]: which power a number takes
        self._total = torch.empty_like(self._tensor_of)
        self._result = torch.empty(len(self._total), device=device)
        n, chunk = len(self._total), CHUNK if self._total.device.type == "cpu" else max(len(self._total), 1)
        self._chunks = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]

    def __call__(self, lanes: Sequence[Tensor]) -> Tensor:
        """lanes: float32 [n] for each lane of this rank -> float32 [n], overwritten by the next call."""
        highest = self._highest(lanes)
        finite = highest.isfinite()
        # |value| * 2**exponent <= 2**bits
        exponent = (self._bits - torch.frexp(highest).exponent.long()).where(finite, 0)
        up = _power_of_two(exponent)
        for chunk in self._chunks:
            scale, total = up.index_select(0, self._tensor_of[chunk]), self._total[chunk].zero_()
            for lane in lanes:
                total += (lane[chunk] * scale).round_().long()  # float32 * float64 is exact
        if self._world_size > 1:
            dist.all_reduce(self._total)
        down = _power_of_two(-exponent).where(finite, torch.nan)
        for chunk in self._chunks:
            self._result[chunk] = self._total[chunk] * down.index_select(0, self._tensor_of[chunk])
        return self._result

    def _highest(self, lanes: Sequence[Tensor]) -> Tensor:
        """Of each tensor the largest magnitude over the lanes of all ranks; infinite where one is not finite."""
        largest = self._result  # free until the sum is there
        for chunk in self._chunks:
            torch.abs(lanes[0][chunk], out=largest[chunk])
            for lane in lanes[1:]:
                torch.maximum(largest[chunk], lane[chunk].abs(), out=largest[chunk])
        end = sum(self._sizes)
        tensors = [part.amax() for part in torch.split(largest[:end], self._sizes)] if self._sizes else []
        highest = torch.cat([*(value[None] for value in tensors), largest[end:]])
        highest.nan_to_num_(torch.inf, torch.inf)  # a maximum over ranks may lose a NaN, never an infinity
        if self._world_size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest


def _power_of_two(exponent: Tensor) -> Tensor:
    """2.0 ** exponent as float64, from its bits: pow need not be exact on every device. For -1022 .. 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)
