"""A checkpoint as a net for others to use: pixels as a decoder leaves them go in, logits come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig, unflatten
from orchestrator.state.checkpoints import Checkpoints, weights_sha256
from orchestrator.state.packed import Checkpoint
from orchestrator.state.records import existing
from orchestrator.state.storage import Storage
from orchestrator.training.models.resnet import build
from orchestrator.training.models.weights import load_weights
from orchestrator.training.pixels import affine
from pipelines.dataset import open_dataset
from pipelines.errors import DataError

EXAMPLE = 2  # images: whoever traces the net with a single one fixes the batch's size at one


class Classifier(nn.Module):
    """uint8 [n, side, side, 3], RGB -> logits, float32 [n, classes]; the bits are those that evaluation computes.

    Where its buffers are moved, it runs: it names no device. No tensor wants a gradient.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        shift, scale = affine(mean, std, torch.device("cpu"))
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).contiguous()  # the layout first: NHWC would choose other kernels, other bits
        return self.net(torch.addcmul(self.shift, x, self.scale))


@dataclass(frozen=True)
class Exported:
    """A checkpoint's net with what must be known to use it."""

    module: Classifier
    run: str
    checkpoint: str  # checkpoints/step-...
    step: int  # global steps done
    top1: float | None  # of the validation split, 0..1; None where this state was not evaluated
    net: str  # such as resnet-50
    classes: int
    class_names: tuple[str, ...]  # in the order of the logits; empty where they are not known
    unnamed: str  # why they are not
    resize: int  # short side before the centre crop, px (bilinear, antialiased)
    size: int  # side of the crop, px: what goes in
    mean: tuple[float, float, float]  # of RGB in 0..1; inside the module
    std: tuple[float, float, float]
    weights_sha256: str
    dataset_digest: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: height, width, channels."""
        return self.size, self.size, 3

    @property
    def example(self) -> Tensor:
        """Black images, uint8 [2, size, size, 3]."""
        return torch.zeros(EXAMPLE, *self.shape, dtype=torch.uint8)

    def about(self) -> dict[str, Any]:
        """Everything but the module, as plain values."""
        plain = {name: value for name, value in vars(self).items() if name != "module"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def export(place: str, checkpoint: str = "", warn: Callable[[str], None] = print) -> Exported:
    """The net of a run's checkpoint. Without a name: the best of those that are kept, else the newest.

    place: the run's folder or URL. warn hears of damaged checkpoints that are passed over.
    Where the dataset is gone, or is another one by now, the classes have no names, and `unnamed` says why.
    Raises DataError where run or checkpoint are not there or damaged, ConfigError for weights of another net.
    """
    place = place.rstrip("/")
    storage, run = Storage(place), place.rpartition("/")[2]
    record = existing(storage, run)
    config = RunConfig.model_validate(unflatten(record.settings))
    found = _checkpoint(Checkpoints(storage, config.train.keep, warn), place, checkpoint)
    weights = found.tensors["model"]
    arch = config.model.arch(classes=len(weights["fc.bias"]))
    net = build(arch, seed=0)
    load_weights(net, weights)
    names, unnamed = _class_names(config, record.dataset_digest)
    return Exported(
        module=Classifier(net, config.data.mean, config.data.std),
        run=run,
        checkpoint=found.name,
        step=found.progress.step,
        top1=found.progress.top1,
        net=arch.name,
        classes=arch.classes,
        class_names=names,
        unnamed=unnamed,
        resize=config.data.eval_resize,
        size=config.data.eval_size,
        mean=config.data.mean,
        std=config.data.std,
        weights_sha256=weights_sha256(net.state_dict()),
        dataset_digest=record.dataset_digest,
    )


def _checkpoint(checkpoints: Checkpoints, place: str, name: str) -> Checkpoint:
    names = checkpoints.names()
    if name and name not in names:
        raise DataError(f"{name} is not in {place}; {_those(names)}")
    found = checkpoints.load(name) if name else checkpoints.best() or checkpoints.latest()
    if found is None:
        raise DataError(f"{name or 'every checkpoint'} in {place} is damaged; {_those(names)}" if names else
                        f"run in {place} has no checkpoint; let it train to its first one")  # fmt: skip
    return found


def _those(names: Sequence[str]) -> str:
    return f"those that are kept: {', '.join(names) or 'none'}"


def _class_names(config: RunConfig, digest: str) -> tuple[tuple[str, ...], str]:
    """(names, why there are none)."""
    root = config.data.root
    try:
        dataset = open_dataset(root, config.data.endpoint)
    except DataError as error:
        return (), f"the dataset cannot be opened: {error}"
    if dataset.digest != digest:
        return (), f"{root} holds another dataset (digest {dataset.digest[:12]}) than the run was trained on"
    return dataset.classes, ""
