"""Parameters and multiply-adds, against the paper, torchvision's published counts, and torch's own counter."""

import doctest

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.training.models import cost
from orchestrator.training.models.arch import Arch
from orchestrator.training.models.cost import multiply_adds, parameters
from orchestrator.training.models.resnet import ResNet


@pytest.mark.parametrize(
    ("depth", "projection", "plain", "gmac_paper", "gmac_later"),
    [
        # Table 1 as torchvision counts it. The paper's basic nets have option A, its bottleneck nets option B and the
        # stride in the first 1x1; the later form has B everywhere and the stride in the 3x3.
        (18, 11_689_512, 11_515_688, 1.795, 1.814),
        (34, 21_797_672, 21_623_848, 3.644, 3.664),
        (50, 25_557_032, None, 3.858, 4.089),
        (101, 44_549_160, None, 7.570, 7.801),
        (152, 60_192_808, None, 11.282, 11.514),
    ],
)
def test_imagenet_nets(depth, projection, plain, gmac_paper, gmac_later):
    assert parameters(Arch(depth=depth, shortcut="B")) == projection
    if plain:
        assert parameters(Arch(depth=depth, shortcut="none")) == plain
        assert parameters(Arch(depth=depth, shortcut="A")) == plain
    paper = Arch(depth=depth, shortcut="A" if plain else "B", version="v1")
    assert round(multiply_adds(paper, 224) / 1e9, 3) == gmac_paper
    assert round(multiply_adds(Arch(depth=depth, shortcut="B", version="v1.5"), 224) / 1e9, 3) == gmac_later


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_nets(depth, count):
    for shortcut in ("A", "none"):
        assert parameters(Arch("cifar", depth, shortcut, width=16, stem="small", classes=10)) == count


NETS = [
    Arch("imagenet", 18, "none", 16, "small", classes=10),
    Arch("imagenet", 34, "A", 8, "imagenet", classes=7),
    Arch("imagenet", 50, "C", 8, "imagenet", "v1", classes=10),
    Arch("imagenet", 50, "A", 8, "small", "v1.5", classes=10),
    Arch("cifar", 20, "B", 16, "small", classes=10),
]


@pytest.mark.parametrize("arch", NETS, ids=lambda arch: f"{arch.layout}-{arch.name}-{arch.shortcut}-{arch.version}")
@pytest.mark.parametrize("size", [32, 33, 47])  # odd sides round differently
def test_counts_are_those_of_the_net_that_is_built(arch, size):
    with torch.device("meta"):
        model = ResNet(arch).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, 3, size, size))
    assert parameters(arch) == sum(p.numel() for p in model.parameters())
    assert 2 * multiply_adds(arch, size) == counter.get_total_flops()


def test_an_image_has_a_size():
    with pytest.raises(ValueError, match="size is 0 pixels; it must be at least 1"):
        multiply_adds(Arch(), 0)


def test_the_examples():
    assert doctest.testmod(cost).failed == 0
