"""Runs as they lie in storage, made without training: run.json and checkpoints with drawn weights."""

import torch

from orchestrator.config import RunConfig
from orchestrator.state.checkpoints import Checkpoints
from orchestrator.state.packed import Progress, pack
from orchestrator.state.records import record_of, write_record
from orchestrator.state.storage import Storage
from orchestrator.training.models.resnet import build
from pipelines.dataset import open_dataset


def weights(config: RunConfig, seed: int, classes: int = 10) -> dict[str, torch.Tensor]:
    """Of the net that the settings say; its running averages are drawn, too, so that none may be forgotten.

    Means about zero: higher ones would leave nothing of an image behind the first ReLUs.
    """
    net, draw = build(config.model.arch(classes), seed), torch.Generator().manual_seed(seed)
    state = net.state_dict()
    for name, tensor in state.items():
        if "running" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + (0.5 if name.endswith("var") else -0.5))
    return state


def record(config: RunConfig) -> Storage:
    """Writes run.json."""
    storage = Storage(config.folder())
    write_record(storage, record_of(config, open_dataset(config.data.root).digest, None))
    return storage


def checkpoint(config: RunConfig, step: int, top1: float | None, seed: int = 0) -> str:
    """Writes one; returns its name. top1: None for a state in mid-epoch."""
    curve = [] if top1 is None else [{"epoch": 1, "val_top1": top1}]
    at = Progress(step=step, epoch=1, digest=0, sums={}, total={}, curve=curve, bad=0, seconds=0.0)
    packed = pack({"model": weights(config, seed), "momentum": {}}, at)
    return Checkpoints(Storage(config.folder()), config.train.keep).save(packed)
