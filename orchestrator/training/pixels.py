"""From decoded images to what a net wants: the first operation on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


def affine(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """(shift, scale), each [3, 1, 1]: shift + scale * x is (x / 255 - mean) / std."""
    deviation = torch.tensor(std, device=device).view(3, 1, 1)
    return -torch.tensor(mean, device=device).view(3, 1, 1) / deviation, 1 / (255 * deviation)


class Pixels:
    """uint8 NHWC, lane after lane -> normalised float32 in the layout the net and its BatchNorms want."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, *, interleaved: bool) -> None:
        self.interleaved = interleaved
        self._std = torch.tensor(std, device=device).view(3, 1, 1)
        self._shift, self._scale = affine(mean, std, device)

    def __call__(self, images: Tensor, lanes: int, colour: Tensor | None = None) -> Tensor:
        """images: uint8 [lanes * mb, S, S, 3] -> float32 [lanes * mb, 3, S, S]: (image / 255 + colour - mean) / std."""
        n, height, width, _ = images.shape
        x = images.permute(0, 3, 1, 2)
        if self.interleaved:  # rows change places in the same copy that makes floats
            x = self.rows(x, lanes, flat=False)
            x = torch.empty(x.shape, device=x.device).copy_(x).view(n, 3, height, width)
        x = torch.addcmul(self._shift, x, self._scale)
        if colour is not None:
            x += self.rows(colour, lanes)[:, :, None, None] / self._std
        return x

    def rows(self, values: Tensor, lanes: int, flat: bool = True) -> Tensor:
        """[lanes * mb, ...] lane after lane -> the order of the net's rows; with flat=False as [mb, lanes, ...]."""
        if not self.interleaved:
            return values
        mixed = values.view(lanes, len(values) // lanes, *values.shape[1:]).transpose(0, 1)  # [mb, lanes, ...]
        return mixed.flatten(0, 1) if flat else mixed
