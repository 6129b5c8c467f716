"""What a net is made of, as plain numbers: the one layer list that `cost` counts and `resnet` builds.

Source: He et al. 2015, Table 1 (ImageNet nets) and section 4.2 (CIFAR nets); the numbers are in tests/test_cost.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Layout = Literal["imagenet", "cifar"]
Shortcut = Literal["none", "A", "B", "C"]
Stem = Literal["imagenet", "small"]
Version = Literal["v1", "v1.5"]

# Blocks a stage, and whether the block is a bottleneck (Table 1).
IMAGENET: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
EXPANSION = 4  # a bottleneck's last 1x1 widens by this much


@dataclass(frozen=True)
class Conv:
    """A square convolution without bias, padded by half its kernel; a BatchNorm always follows it."""

    inputs: int
    outputs: int
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        return self.kernel // 2


@dataclass(frozen=True)
class Block:
    """Two or three convolutions, and what is added to their result.

    `shortcut` is "none" (plain net), "identity", "pad" (option A: subsampled, zeros for new channels) or
    "projection" (options B and C: a 1x1 convolution and its BatchNorm).
    """

    name: str
    convs: tuple[Conv, ...]
    shortcut: Literal["none", "identity", "pad", "projection"]

    @property
    def inputs(self) -> int:
        return self.convs[0].inputs

    @property
    def outputs(self) -> int:
        return self.convs[-1].outputs

    @property
    def stride(self) -> int:
        return max(conv.stride for conv in self.convs)

    @property
    def projection(self) -> Conv:
        """The shortcut's convolution; there is one only where `shortcut` is "projection"."""
        return Conv(self.inputs, self.outputs, 1, self.stride)


@dataclass(frozen=True)
class Arch:
    """A plain or residual net. Raises ValueError for one that does not exist, naming what does.

    layout: "imagenet" (18, 34, 50, 101 or 152 layers, four stages) or "cifar" (6n+2 layers, three stages).
    shortcut: "none" is the plain twin; A, B and C as in the paper's section 4.1.
    width: channels of the first stage: 64 in the paper's ImageNet nets, 16 in its CIFAR nets.
    stem: "imagenet" is 7x7, stride 2, then a 3x3 max-pool of stride 2; "small" is 3x3, stride 1, no pool.
    version: where a bottleneck that halves the image has its stride: "v1" in the first 1x1 (paper), "v1.5" in the 3x3
        (torchvision, NVIDIA). Nets of basic blocks are the same in both.
    zero_init: gamma = 0 in each block's last BatchNorm (Goyal et al. 2017), so that blocks start as identities.
    """

    layout: Layout = "imagenet"
    depth: int = 18
    shortcut: Shortcut = "B"
    width: int = 64
    stem: Stem = "imagenet"
    version: Version = "v1.5"
    classes: int = 1000
    zero_init: bool = False

    def __post_init__(self) -> None:
        _choice("layout", self.layout, "imagenet", "cifar")
        _choice("shortcut", self.shortcut, "none", "A", "B", "C")
        _choice("stem", self.stem, "imagenet", "small")
        _choice("version", self.version, "v1", "v1.5")
        _check_depth(self.layout, self.depth)
        for name in ("width", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.zero_init and self.shortcut == "none":
            raise ValueError(
                "zero_init is true for a plain net, which nothing would pass; use false, or shortcut A, B or C"
            )

    @property
    def name(self) -> str:
        return f"{'plain' if self.shortcut == 'none' else 'resnet'}-{self.depth}"

    @property
    def bottleneck(self) -> bool:
        return self.layout == "imagenet" and IMAGENET[self.depth][1]

    @property
    def stages(self) -> tuple[int, ...]:
        """Blocks in each stage."""
        return IMAGENET[self.depth][0] if self.layout == "imagenet" else ((self.depth - 2) // 6,) * 3

    @property
    def stem_conv(self) -> Conv:
        return Conv(3, self.width, 7, 2) if self.stem == "imagenet" else Conv(3, self.width, 3, 1)

    @property
    def pool(self) -> bool:
        """Whether a 3x3 max-pool of stride 2 follows the stem."""
        return self.stem == "imagenet"

    @property
    def features(self) -> int:
        """Channels that reach the classifier."""
        return self.blocks[-1].outputs

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every block in order; named as torchvision names them, `layer<stage>.<block>`, stages from 1."""
        return tuple(self._walk())

    def _walk(self) -> Iterator[Block]:
        inputs = self.width
        for stage, count in enumerate(self.stages):
            channels = self.width * 2**stage
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                convs = self._convs(inputs, channels, stride)
                yield Block(f"layer{stage + 1}.{i}", convs, self._shortcut(convs))
                inputs = convs[-1].outputs

    def _convs(self, inputs: int, channels: int, stride: int) -> tuple[Conv, ...]:
        if not self.bottleneck:
            return Conv(inputs, channels, 3, stride), Conv(channels, channels, 3, 1)
        first, second = (stride, 1) if self.version == "v1" else (1, stride)
        return (
            Conv(inputs, channels, 1, first),
            Conv(channels, channels, 3, second),
            Conv(channels, channels * EXPANSION, 1, 1),
        )

    def _shortcut(self, convs: tuple[Conv, ...]) -> Literal["none", "identity", "pad", "projection"]:
        if self.shortcut == "none":
            return "none"
        if self.shortcut == "C":
            return "projection"
        if convs[0].inputs == convs[-1].outputs and all(conv.stride == 1 for conv in convs):
            return "identity"
        return "pad" if self.shortcut == "A" else "projection"


def _choice(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def _check_depth(layout: Layout, depth: int) -> None:
    if layout == "imagenet":
        if depth not in IMAGENET:
            nearest = min(IMAGENET, key=lambda known: abs(known - depth))
            raise ValueError(f"depth is {depth}; the imagenet layout has 18, 34, 50, 101, 152 (nearest: {nearest})")
    elif depth < 8 or (depth - 2) % 6:
        nearest = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ValueError(f"depth is {depth}; the cifar layout has 6n+2: 8, 14, 20, 26, 32, … (nearest: {nearest})")
