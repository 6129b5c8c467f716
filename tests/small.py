"""A small net, small batches and a step over them, for tests of training."""

import hashlib

import torch
from torch import Tensor, nn

from orchestrator.training.models.arch import Arch
from orchestrator.training.models.resnet import build
from orchestrator.training.norm import LaneBatchNorm2d
from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD
from orchestrator.training.step import StepStats, TrainStep

NET = Arch("cifar", 8, "B", width=4, stem="small", classes=7)
MICRO_BATCH, SIDE = 6, 8


def batch(step: int, lanes: int, classes: int = NET.classes) -> tuple[Tensor, Tensor]:
    """The global batch of one step: uint8 [lanes * MICRO_BATCH, SIDE, SIDE, 3], lane after lane, and labels."""
    generator = torch.Generator().manual_seed(1000 + step)
    n = lanes * MICRO_BATCH
    images = torch.randint(0, 256, (n, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, classes, (n,), generator=generator)


def share(rank: int, world_size: int, lanes: int) -> slice:
    """Rows of the global batch that a rank plays: contiguous lanes, the first ranks one more (8 over 3: 3, 3, 2)."""
    first, more = divmod(lanes, world_size)
    start = rank * first + min(rank, more)
    return slice(start * MICRO_BATCH, (start + first + (rank < more)) * MICRO_BATCH)


def make_step(lanes: int, *, seed: int = 0, arch: Arch = NET, **settings) -> TrainStep:
    """A step for a rank with `lanes` lanes; the only rank unless told otherwise."""
    settings = {"total_lanes": lanes, "micro_batch": MICRO_BATCH} | settings
    return TrainStep(build(arch, seed), lanes=lanes, **settings)


def run(step: TrainStep, first: int, last: int, lanes: int, rows: slice = slice(None), lr: float = 0.1) -> StepStats:
    """Steps first to last - 1 on this rank's rows; the last one's numbers."""
    for number in range(first, last):
        images, labels = batch(number, lanes)
        stats = step(images[rows], labels[rows], lr)
    return stats


def sha256(model: nn.Module) -> str:
    """Over names and bytes of the whole state, buffers included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def with_plain_norms(model: nn.Module, momentum: float = 0.1) -> nn.Module:
    """The same net with torch's own BatchNorm2d in place of ours."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LaneBatchNorm2d):
                norm = nn.BatchNorm2d(child.num_features, momentum=momentum)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm.train(child.training))
    return model


def normalised(images: Tensor) -> Tensor:
    """As torchvision's ToTensor and Normalize: uint8 NHWC -> float32 NCHW."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
