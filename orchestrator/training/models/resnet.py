"""Plain and residual nets from one block: the layer list of `arch`, as torch modules.

State-dict names follow torchvision's rule, so that its weights load into the B nets of the imagenet layout (v1.5):
`conv1`, `bn1`; `layer<s>.<b>.conv<k>`, `.bn<k>` (s and k from 1, b from 0); where the shortcut is a projection
`layer<s>.<b>.downsample.0` (convolution) and `.1` (BatchNorm); `fc`. The plain net is the same without shortcuts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orchestrator.training.models.arch import Arch, Block, Conv
from orchestrator.training.norm import LaneBatchNorm2d


def build(arch: Arch, seed: int) -> nn.Module:
    """The net on the CPU, in training mode: float32 [n, 3, H, W] -> logits [n, classes].

    Convolutions are He-normal by fan-out; the classifier is uniform within 1/sqrt(features), as torch's own default.
    Weights depend on `arch` and `seed` alone: a generator of our own draws them, the global one is not touched.
    """
    with torch.device("meta"):  # shapes only: torch's own initialisation would draw from the global generator
        model = ResNet(arch)
    model.to_empty(device="cpu")
    _initialise(model, torch.Generator().manual_seed(seed), arch.zero_init)
    return model


class ResNet(nn.Module):
    """Stem, stages of blocks, global average, classifier."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        self.conv1 = _conv(arch.stem_conv)
        self.bn1 = LaneBatchNorm2d(arch.stem_conv.outputs)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if arch.pool else nn.Identity()
        for stage in range(1, len(arch.stages) + 1):
            members = [block for block in arch.blocks if block.name.startswith(f"layer{stage}.")]
            self.add_module(f"layer{stage}", nn.Sequential(*map(ResidualBlock, members)))
        self.stages = len(arch.stages)
        self.fc = nn.Linear(arch.features, arch.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """relu(convolutions(x) + shortcut(x)); a plain block adds nothing."""

    downsample: nn.Module | None

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        for i, conv in enumerate(block.convs, start=1):
            self.add_module(f"conv{i}", _conv(conv))
            self.add_module(f"bn{i}", LaneBatchNorm2d(conv.outputs))
        self.downsample = None
        if block.shortcut == "projection":
            self.downsample = nn.Sequential(_conv(block.projection), LaneBatchNorm2d(block.outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        last = len(self.block.convs)
        for i in range(1, last + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < last:
                out = F.relu(out)  # not in place: on the view that fused lanes are, that would cost a copy
        if self.block.shortcut != "none":
            out = out + self._shortcut(x)
        return F.relu(out)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        if self.block.shortcut == "identity":
            return x
        stride, more = self.block.stride, self.block.outputs - self.block.inputs
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, more))  # option A: zeros for the new channels


def _conv(conv: Conv) -> nn.Conv2d:
    return nn.Conv2d(conv.inputs, conv.outputs, conv.kernel, conv.stride, conv.padding, bias=False)


@torch.no_grad()
def _initialise(model: nn.Module, generator: torch.Generator, zero_init: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, LaneBatchNorm2d):
            module.reset_parameters()  # gamma 1, beta 0, running mean 0 and variance 1: nothing is drawn
            module.reserve(1)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    if zero_init:
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(getattr(module, f"bn{len(module.block.convs)}").weight)
