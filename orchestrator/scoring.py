"""Exact evaluation of weights, in one process: each validation image once, the protocol beside the number."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orchestrator.config import RunConfig
from orchestrator.feed import Feed, scoring_feed, threads_of
from orchestrator.plan import counts_of
from orchestrator.state.checkpoints import Checkpoints, weights_sha256
from orchestrator.state.records import settings_of
from orchestrator.state.register import BadImage
from orchestrator.state.storage import Storage
from orchestrator.training.evaluate import evaluate
from orchestrator.training.models.resnet import build
from orchestrator.training.models.weights import load_weights
from pipelines.batches import Batch, EvalBatches
from pipelines.dali import Where, resolve_decode
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from pipelines.quarantine import BadSample, Quarantine, allowed
from pipelines.reader import Reader

OWN = ("decode", "threads", "endpoint", "cache", "cache_gb", "cache_in_memory", "fetches", "wait_seconds")


@dataclass(frozen=True)
class Score:
    """What `jobs.evaluate` reports. Accuracies are fractions."""

    net: str
    top1: float
    top5: float
    loss: float
    samples: int
    id_digest: str  # of (slot, sample id, bytes): equal digests mean that equal images were scored
    resize: int  # short side, px (bilinear, antialiased, as torchvision's Resize)
    crop: int  # centre crop, px
    decode: str
    precision: str
    bad_samples: int  # each replaced by the nearest good one
    bad_images: list[dict[str, Any]]  # see register.BadImage
    weights_sha256: str
    dataset_digest: str

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def score(
    config: RunConfig, state: dict[str, torch.Tensor], device: torch.device, say: Callable[[str], None] = print
) -> Score:
    """Scores the net that `config` describes with the weights `state` on the validation split of data.root.

    say: hears of what is fetched, where the dataset is streamed.
    """
    dataset, data = open_dataset(config.data.root, config.data.endpoint), config.data
    arch = config.model.arch(counts_of(dataset).classes)
    model = build(arch, seed=0)
    _same_classes(model.state_dict(), state, len(dataset.classes))
    load_weights(model, state)
    model.to(device)
    decode = resolve_decode(data.decode, device.type == "cuda")
    bad: list[BadSample] = []
    with (
        scoring_feed(config, dataset, "val", say) as feed,
        _batches(config, feed.readers["val"], device, decode, bad.append) as batches,
    ):
        sums = evaluate(
            model,
            _followed(batches, feed),
            data.mean,
            data.std,
            precision=config.train.precision,
            device=device,
            channels_last=config.train.channels_last,
            batch_size=data.eval_batch,
        )
    if sums.count != dataset.splits["val"].samples:
        raise DataError(f"evaluation counted {sums.count} of {dataset.splits['val'].samples} validation images")
    return Score(
        arch.name,
        sums.top1_share,
        sums.top5_share,
        sums.loss,
        sums.count,
        f"{sums.digest:016x}",
        data.eval_resize,
        data.eval_size,
        decode,
        config.train.precision,
        len(bad),
        [asdict(BadImage("val", **asdict(sample))) for sample in bad],
        weights_sha256(model.state_dict()),
        dataset.digest,
    )


def config_of_run(config: RunConfig, name: str) -> RunConfig:
    """The settings of the run `name` in config's storage; where things are and what they use is config's own.

    Of the two limits of bad images the higher one holds: neither a run that was let through, nor a flag, is in vain.
    """
    run = settings_of(Storage(f"{config.cluster.storage}/{name}"), name)
    return run.replace(
        {
            "name": name,
            "cluster.storage": config.cluster.storage,
            "cluster.device": config.cluster.device,
            "data.max_bad": max(config.data.max_bad, run.data.max_bad),
            **{f"data.{name}": getattr(config.data, name) for name in OWN},
        }
    )


def weights_of_run(config: RunConfig, *, best: bool = False) -> dict[str, torch.Tensor]:
    """Weights of the newest whole checkpoint, or of the one with the best validation top-1 of those that are kept.

    Raises DataError where there is none.
    """
    checkpoints = Checkpoints(Storage(config.folder()), config.train.keep)
    found = checkpoints.best() if best else checkpoints.latest()
    if found is None:
        what = "checkpoint that was evaluated; score its newest without --best" if best else "checkpoint"
        raise DataError(f"run '{config.name}' in {config.folder()} has no {what}")
    return dict(found.tensors["model"])


def _same_classes(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], classes: int) -> None:
    head = next((state[n] for n in ("fc.weight", "module.fc.weight") if n in state), None)
    if head is not None and head.shape[0] != own["fc.weight"].shape[0]:
        raise ConfigError(
            f"the weights are for {head.shape[0]} classes, the dataset has {classes}; a new head would score "
            f"at chance: evaluate on the dataset that they were trained on"
        )


def _followed(batches: EvalBatches, feed: Feed) -> Iterator[Batch]:
    """The same batches; the feed hears where they are."""
    for batch in batches:
        feed.at(int(batch.ids[0]))
        yield batch


def _batches(
    config: RunConfig, reader: Reader, device: torch.device, decode: Where, tell: Callable[[BadSample], None]
) -> EvalBatches:
    data, samples = config.data, reader.split.samples
    return EvalBatches(
        reader,
        range(samples),
        resize=data.eval_resize,
        size=data.eval_size,
        batch_size=data.eval_batch,
        device=device,
        decode=decode,
        threads=threads_of(config),
        quarantine=Quarantine(allowed(data.max_bad, samples), tell),
    )
