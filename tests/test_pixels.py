"""The first operation on the device: rows, layout, numbers."""

import pytest
import torch

from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from tests.small import normalised

CPU = torch.device("cpu")


def numbered(lanes, micro_batch):
    """Images of one pixel whose red tells lane and place: 10 * lane + place."""
    values = torch.tensor([10 * lane + i for lane in range(lanes) for i in range(micro_batch)], dtype=torch.uint8)
    return values.view(-1, 1, 1, 1).expand(-1, 2, 2, 3).contiguous()


@pytest.mark.parametrize(
    ("interleaved", "rows"),
    [
        (True, [0, 10, 20, 1, 11, 21]),  # sample i of lane l is row i * lanes + l
        (False, [0, 1, 10, 11, 20, 21]),
    ],
)
def test_rows(interleaved, rows):
    pixels = Pixels((0, 0, 0), (1 / 255,) * 3, CPU, interleaved=interleaved)
    images = numbered(3, 2)
    x = pixels(images, 3)
    assert x[:, 0, 0, 0].tolist() == rows
    assert pixels.rows(images[:, 0, 0, 0], 3).tolist() == rows  # labels change places alike
    assert x.is_contiguous() if interleaved else x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("side", [1, 5])
def test_numbers_are_torchvisions(interleaved, side):
    images = torch.randint(0, 256, (4, side, side + 1, 3), dtype=torch.uint8)
    x = Pixels(IMAGENET_MEAN, IMAGENET_STD, CPU, interleaved=interleaved)(images, 1)
    torch.testing.assert_close(x, normalised(images))


@pytest.mark.parametrize("interleaved", [True, False])
def test_colour_is_added_in_units_of_the_image(interleaved):
    pixels = Pixels(IMAGENET_MEAN, IMAGENET_STD, CPU, interleaved=interleaved)
    images, colour = numbered(2, 3), torch.arange(18).view(6, 3) / 255.0  # whole steps of a uint8 image
    shifted = (images + (colour * 255)[:, None, None]).to(torch.uint8)
    torch.testing.assert_close(pixels(images, 2, colour), pixels(shifted, 2))
