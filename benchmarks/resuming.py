"""From nothing to the first batch of a run that resumes somewhere in an epoch; what skipping there costs webdataset.

"Nothing" is a process that has imported everything and knows where the dataset lies.
"""

import itertools
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.repeated import repeated
from pipelines.augment import Augment
from pipelines.batches import TrainBatches
from pipelines.dataset import MANIFEST, Dataset, Shard, Split, manifest, open_dataset
from pipelines.index import RECORD, write_index
from pipelines.order import Order
from pipelines.quarantine import Quarantine
from pipelines.reader import EncodedBatch, Reader
from pipelines.remote.cache import Cache
from pipelines.remote.needs import Needs
from pipelines.remote.supply import How, Supply

STAGES = {
    "manifest": "dataset.json read and checked",
    "index": "index read and checked",
    "order": "decoder built, ids of the step",
    "read": "the images read and checked",
    "decode": "decoded to 224 px",
}
STEPS = 4  # that the resumed run may go ahead


@dataclass(frozen=True)
class Shape:
    """Of an epoch."""

    streams: int
    lanes: int
    micro_batch: int
    window: int

    def order(self, counts: Sequence[int]) -> Order:
        return Order(tuple(counts), 0, self.streams, self.lanes, self.micro_batch, self.window)


def enlarged(data: Path, out: Path, counts: Sequence[int], distinct: int) -> Dataset:
    """A dataset whose shards have so many samples, each a real JPEG: `distinct` real tars, and hard links to them."""
    real = repeated(data, out / "real", distinct * counts[0], counts[0])
    tars, records = real.splits["train"].shards, np.split(real.index("train"), distinct)
    place = out / "data"
    place.mkdir()
    shards = []
    for number, samples in enumerate(counts):
        tar = tars[number % distinct]
        shards.append(Shard(f"train-{number:06d}.tar", samples, tar.bytes, tar.sha256))
        os.link(real.root / tar.name, place / shards[-1].name)
    index = np.concatenate([records[number % distinct][:samples] for number, samples in enumerate(counts)])
    index["shard"] = np.repeat(np.arange(len(counts)), counts)
    return written(place, real.classes, shards, index)


def written(place: Path, classes: tuple[str, ...], shards: Sequence[Shard], index: "np.ndarray[Any, Any]") -> Dataset:
    """dataset.json and index of shards that are there; validation is the same."""
    split = Split("train", tuple(shards), "train.index", write_index(place / "train.index", index.astype(RECORD)))
    document = manifest(classes, {"train": split, "val": split}, {"source": "benchmark"})
    (place / MANIFEST).write_text(json.dumps(document))
    return open_dataset(place)


def first_batch(place: str, cache: Path, shape: Shape, share: float, size: int, threads: int) -> dict[str, float]:
    """Seconds of each stage, for the worker of lane 0 that resumes after a share of the epoch.

    From a folder, or from a server, with an empty cache on a node that plays all lanes.
    """
    watch = Watch()
    with ExitStack() as stack:
        dataset = open_dataset(place)
        watch("manifest")
        order = shape.order(dataset.splits["train"].counts)
        start = int(share * order.steps_per_epoch)
        reader = _reader(dataset, cache, order, start, threads, stack)
        watch("index")
        batches = TrainBatches(
            cast(Reader, _Watched(reader, watch)),
            order,
            Augment(size=size),
            lanes=range(1),
            seed=0,
            start=start,
            stop=min(start + STEPS, order.steps_per_epoch),
            device=torch.device("cpu"),
            decode="cpu",
            threads=threads,
            prefetch=1,
            quarantine=Quarantine(0),
        )
        batch = next(iter(stack.enter_context(batches)))
        watch("decode")
        assert (batch.step, len(batch.images)) == (start, shape.micro_batch)
    return watch.stages()


def _reader(dataset: Dataset, cache: Path, order: Order, start: int, threads: int, stack: ExitStack) -> Reader:
    if not dataset.streamed:
        return stack.enter_context(closing(Reader(dataset, "train", threads)))
    supply = Supply(dataset, Cache(cache), Needs(order, range(order.lanes)), How(), step=start)
    return stack.enter_context(closing(stack.enter_context(closing(supply)).reader("train", threads)))


class Watch:
    """When each stage ended, for the first time."""

    def __init__(self) -> None:
        self._began, self._ended = time.perf_counter(), dict[str, float]()

    def __call__(self, stage: str) -> None:
        self._ended.setdefault(stage, time.perf_counter())

    def stages(self) -> dict[str, float]:
        """Seconds that each took."""
        ends = [self._began, *(self._ended[stage] for stage in STAGES)]
        return {stage: end - begin for stage, (begin, end) in zip(STAGES, itertools.pairwise(ends), strict=True)}


class _Watched:
    """A reader whose first read is watched."""

    def __init__(self, reader: Reader, watch: Watch) -> None:
        self._reader, self._watch = reader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, *args: Any) -> EncodedBatch:
        self._watch("order")
        batch = self._reader.read(*args)
        self._watch("read")
        return batch


def skipping(shards: Sequence[str], samples: int) -> float:
    """Seconds an image that webdataset reads and throws away, over so many; one process, nothing decoded.

    Raises ValueError where there are fewer.
    """
    import webdataset

    data = webdataset.WebDataset(list(shards), shardshuffle=len(shards)).shuffle(1000).to_tuple("jpg")
    began = time.perf_counter()
    skipped = sum(1 for _ in itertools.islice(data, samples))
    if skipped < samples:
        raise ValueError(f"the part of a worker holds {skipped:,} samples, {samples:,} were to be skipped")
    return (time.perf_counter() - began) / skipped
