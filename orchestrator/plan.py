"""Settings and a dataset's counts -> what will happen: steps, lanes, learning rate, cost. Pure, and printable.

This is what `--dry-run` shows; a run computes nothing else about its future.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import RunConfig
from orchestrator.training import schedule
from orchestrator.training.models import cost
from pipelines.augment import Augment
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import ConfigError
from pipelines.order import Order
from pipelines.remote.url import is_url


@dataclass(frozen=True)
class Counts:
    """What a plan needs to know of a dataset."""

    train_shards: tuple[int, ...]  # samples of each shard
    val_samples: int
    classes: int
    stated: bool = True  # False: the official counts of a dataset that is not there yet
    train_bytes: int = 0  # of all training shards, where they are streamed


# For `--dry-run` before anything is packed. Official counts; shards as the packer cuts them.
OFFICIAL = {
    "imagenet": Counts((1250,) * 1024 + (1167,), 50_000, 1000, stated=False),
    "cifar10": Counts((1250,) * 40, 10_000, 10, stated=False),
    "digits": Counts((180,) * 7 + (177,), 360, 10, stated=False),
}


@dataclass(frozen=True)
class Plan:
    """A run's arithmetic."""

    order: Order
    augment: Augment
    classes: int
    train_samples: int
    val_samples: int
    epochs: int
    micro_batch: int
    steps_per_epoch: int
    parameters: int
    multiply_adds: int  # of one image forward

    @property
    def steps(self) -> int:
        """Global steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def position(self, step: int) -> tuple[int, int]:
        """Global step -> (epoch, step of that epoch)."""
        return divmod(step, self.steps_per_epoch)


def make_plan(config: RunConfig, counts: Counts) -> Plan:
    """Raises ConfigError where settings and dataset do not fit together."""
    data, train = config.data, config.train
    micro_batch = train.global_batch // data.lanes
    try:
        order = Order(
            counts=counts.train_shards,
            seed=train.seed,
            streams=data.streams,
            lanes=data.lanes,
            micro_batch=micro_batch,
            window=data.window,
        )
    except ValueError as error:
        raise ConfigError(
            f"train.global_batch = {train.global_batch}, data.lanes = {data.lanes}, data.streams = "
            f"{data.streams} do not fit {sum(counts.train_shards)} training samples: {error}"
        ) from error
    arch = config.model.arch(counts.classes)
    return Plan(
        order=order,
        augment=Augment(
            kind=data.augment,
            size=data.size,
            resize=data.eval_resize,
            scale=data.scale,
            ratio=data.ratio,
            short_side=data.short_side,
            pad=data.pad,
            flip=data.flip,
        ),
        classes=counts.classes,
        train_samples=sum(counts.train_shards),
        val_samples=counts.val_samples,
        epochs=train.epochs,
        micro_batch=micro_batch,
        steps_per_epoch=order.steps_per_epoch,
        parameters=cost.parameters(arch),
        multiply_adds=cost.multiply_adds(arch, data.eval_size),
    )


def counts_of(dataset: Dataset) -> Counts:
    """What a plan needs of a dataset."""
    train = dataset.splits["train"]
    size = sum(shard.bytes for shard in train.shards) if dataset.streamed else 0
    return Counts(train.counts, dataset.splits["val"].samples, len(dataset.classes), train_bytes=size)


def plan_counts(config: RunConfig) -> Counts:
    """For `--dry-run`: the dataset's counts; the official ones where a known dataset is not packed yet."""
    if is_url(config.data.root) or Path(config.data.root).exists():
        return counts_of(open_dataset(config.data.root, config.data.endpoint))
    if config.data.name in OFFICIAL:
        return OFFICIAL[config.data.name]
    raise ConfigError(
        f"data.root is {config.data.root}, which does not exist; pack a dataset there "
        f"(python -m jobs.pack --help) or name another folder"
    )


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The contiguous run of lanes that a rank plays: 8 lanes over 3 ranks are 3 + 3 + 2.

    Contiguous, so that the lanes of one stream stay together on a rank, and on a node.
    """
    each, more = divmod(lanes, world_size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def eval_ids(rank: int, world_size: int, samples: int) -> range:
    """The contiguous validation samples that a rank scores, so that a node reads its own part of the shards."""
    return range(rank * samples // world_size, (rank + 1) * samples // world_size)


def efficiency(lanes: int, world_size: int) -> float:
    """Share of the workers' time that is used when a step lasts as long as its fullest rank: V / (W * ceil(V / W))."""
    return lanes / (world_size * -(-lanes // world_size))


def learning_rate(config: RunConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the global step. Raises ConfigError where warm-up and schedule do not fit."""
    optim = config.optim
    try:
        return schedule.build(
            optim.schedule,
            optim.lr,
            config.train.epochs * steps_per_epoch,
            warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
            warmup_from=optim.lr * optim.warmup_start,
            milestones=[round(m * steps_per_epoch) for m in optim.milestones if optim.schedule == "step"],
            gamma=optim.gamma,
        )
    except ValueError as error:
        raise ConfigError(f"optim.schedule is {optim.schedule}: {error}") from error


def describe(config: RunConfig, plan: Plan, counts: Counts) -> str:
    """The plan as text for a person."""
    rate = learning_rate(config, plan.steps_per_epoch)
    arch = config.model.arch(plan.classes)
    least, most = config.cluster.span
    left_out = plan.order.left_out
    marks = sorted({0, plan.steps // 4, plan.steps // 2, 3 * plan.steps // 4, plan.steps - 1})
    lines = [
        f"net        {arch.name}, shortcut {arch.shortcut}, {plan.parameters:,} parameters, "
        f"{plan.multiply_adds / 1e9:.3f} G multiply-adds an image at {config.data.eval_size} px",
        f"data       {plan.train_samples:,} training and {plan.val_samples:,} validation images, {plan.classes} classes"
        + ("" if counts.stated else "  (not packed yet: the official counts)"),
        f"order      {config.data.lanes} lanes x {plan.micro_batch} images = {config.train.global_batch} a step, "
        f"{config.data.streams} streams, window {config.data.window or 'whole stream'}",
        f"epoch      {plan.steps_per_epoch:,} steps, {left_out} images left out (others each time)",
        f"run        {plan.epochs} epochs = {plan.steps:,} steps",
        "rate       " + ", ".join(f"{rate(s):.4g} at step {s:,}" for s in marks),
    ]
    if counts.train_bytes:
        lines.insert(3, f"streamed   {_streamed(config, counts)}")
    for world in sorted({least, most, max(most - 1, 1)}, reverse=True):  # one lost is what a user should know before
        shares = [len(lanes_of(r, world, config.data.lanes)) for r in range(world)]
        shown = " + ".join(map(str, shares)) if world <= 8 else f"{max(shares)} at most"
        lines.append(
            f"workers    {world}: lanes {shown}, {efficiency(config.data.lanes, world):.0%} of their time used"
        )
    return "\n".join(lines)


def _streamed(config: RunConfig, counts: Counts) -> str:
    """What a node's cache is asked for."""
    shards, streams, total = len(counts.train_shards), config.data.streams, counts.train_bytes
    window = min(config.data.window or shards, -(-shards // streams)) * total / shards
    whole, stream, held = (in_bytes(size) for size in (total, total / streams, window))
    return (
        f"{whole} in {streams} streams of {stream}; a node keeps those of its lanes, a window of each ({held}) at least"
    )


def in_bytes(count: float) -> str:
    """5000000 -> '5.0 MB', 145e9 -> '145.0 GB'."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
