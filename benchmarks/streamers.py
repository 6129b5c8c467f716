"""Those who stream: this project, webdataset, and MosaicML streaming where it is installed, as their manuals do it.

Each is a generator of epochs, an epoch one of the images in each of its batches. All shuffle, each in its own way.
"""

import importlib
import importlib.metadata
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import FORK, Pixels
from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipelines.augment import Augment
from pipelines.batches import TrainBatches
from pipelines.dataset import Dataset, open_dataset
from pipelines.order import Order
from pipelines.quarantine import Quarantine
from pipelines.reader import Reader
from pipelines.remote.cache import Cache
from pipelines.remote.needs import Needs
from pipelines.remote.supply import How, Supply

EPOCHS = 2  # the first with a cold cache, the second with what it left
WINDOW = 16  # shards, as in the ImageNet recipes
SHUFFLE = 100  # samples of webdataset's buffer


@dataclass(frozen=True)
class Place:
    """The same images on a server, for everyone."""

    url: str  # of the dataset
    endpoint: str
    tars: tuple[str, ...]  # the training tars, for clients that speak HTTP
    mds: str  # MosaicML's shards; '' where it cannot read from such a server


@dataclass(frozen=True)
class Work:
    """size: of decoded images, px. threads: that decode, or worker processes."""

    size: int
    batch: int
    threads: int


Epochs = Iterator[Iterator[int]]
Streamer = Callable[[Place, Path, Work], Epochs]  # (place, an empty folder for a cache, work)


# -- this project ------------------------------------------------------------------------------------------------------


def skiplane(place: Place, cache: Path, work: Work, *, decode: bool) -> Epochs:
    """Shards hashed as they arrive, samples' crc32 checked whenever they are read."""
    dataset = open_dataset(place.url, place.endpoint)
    order = Order(dataset.splits["train"].counts, seed=0, streams=1, lanes=1, micro_batch=work.batch, window=WINDOW)
    supply = Supply(dataset, Cache(cache), Needs(order, range(1), epochs=EPOCHS), How())
    with closing(supply), closing(supply.reader("train", work.threads)) as reader:
        for epoch in range(EPOCHS):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            batches = _decoded(reader, order, steps, work) if decode else _read(reader, order, steps)
            yield _followed(supply, steps, batches)


def _read(reader: Reader, order: Order, steps: range) -> Iterator[int]:
    for step in steps:
        yield len(reader.read(order.ids(*divmod(step, order.steps_per_epoch), range(1)).ravel()))


def _decoded(reader: Reader, order: Order, steps: range, work: Work) -> Iterator[int]:
    batches = TrainBatches(
        reader,
        order,
        Augment(size=work.size),
        lanes=range(1),
        seed=0,
        start=steps.start,
        stop=steps.stop,
        device=torch.device("cpu"),
        decode="cpu",
        threads=work.threads,
        prefetch=2,
        quarantine=Quarantine(0),
    )
    with batches:
        yield from (len(batch.images) for batch in batches)


def _followed(supply: Supply, steps: range, batches: Iterator[int]) -> Iterator[int]:
    """Says where it is, as training does."""
    for step, images in zip(steps, batches, strict=True):
        yield images
        supply.at(step + 1)


# -- webdataset --------------------------------------------------------------------------------------------------------


def webdataset_bytes(place: Place, cache: Path, work: Work, *, cached: bool) -> Epochs:
    """In this process, as ours. URLs are read through curl, webdataset's own way."""
    samples = _webdataset(place, cache if cached else None)
    for _ in range(EPOCHS):
        yield map(len, _grouped(samples, work.batch))


def webdataset_dali(place: Place, cache: Path, work: Work) -> Epochs:
    """DALI decodes and crops what webdataset reads, through its external source."""
    samples = _webdataset(place, cache)
    for _ in range(EPOCHS):
        yield _by_dali(_grouped(samples, work.batch), work)


def webdataset_pillow(place: Place, cache: Path, work: Work) -> Epochs:
    """Pillow decodes in the DataLoader's worker processes."""
    import webdataset

    data = _webdataset(place, cache).map_tuple(partial(_pixels, _pixels_of(work))).batched(work.batch)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=work.threads, persistent_workers=True, **FORK)
    for _ in range(EPOCHS):
        yield (len(images) for (images,) in loader)


def _webdataset(place: Place, cache: Path | None) -> Any:
    import webdataset

    held = {"cache_dir": str(cache)} if cache else {}
    data = webdataset.WebDataset(list(place.tars), shardshuffle=len(place.tars), **held)
    return data.shuffle(SHUFFLE).to_tuple("jpg")


def _grouped(samples: Iterable[tuple[bytes]], batch: int) -> Iterator[list[bytes]]:
    encoded = (image for (image,) in samples)
    while group := list(itertools.islice(encoded, batch)):
        yield group


def _by_dali(groups: Iterator[list[bytes]], work: Work) -> Iterator[int]:
    """The graph of peers.dali_reader, fed from outside."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=work.batch, num_threads=work.threads, device_id=None, seed=0)
    def graph() -> Any:
        arrays = ([np.frombuffer(image, np.uint8) for image in group] for group in groups)
        encoded = fn.external_source(source=arrays, batch=True, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], output_type=types.RGB
        )
        images = fn.resize(images, size=[work.size, work.size], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    pipe = graph()
    pipe.build()
    while True:
        try:
            (images,) = pipe.run()
        except StopIteration:
            return
        yield len(torch.utils.dlpack.from_dlpack(images.as_tensor()))


# -- MosaicML streaming ------------------------------------------------------------------------------------------------


def mosaic_version() -> str:
    """Of MosaicML streaming; '' where it is not installed."""
    try:
        return importlib.metadata.version("mosaicml-streaming")
    except importlib.metadata.PackageNotFoundError:
        return ""


def write_mds(dataset: Dataset, out: Path) -> None:
    """The training images as MosaicML's shards, of about the size of the tars."""
    shards = dataset.splits["train"].shards
    columns, size = {"jpg": "bytes", "cls": "int"}, max(shard.bytes for shard in shards)
    writer = importlib.import_module("streaming").MDSWriter(out=str(out), columns=columns, size_limit=size)
    with writer, closing(Reader(dataset, "train")) as reader:
        for sample in range(dataset.splits["train"].samples):
            encoded = reader.read([sample])
            writer.write({"jpg": encoded.image(0).tobytes(), "cls": int(encoded.labels[0])})


def mosaic_bytes(place: Place, cache: Path, work: Work) -> Epochs:
    """In this process, as ours."""
    dataset = _mosaic(place, cache, work)
    for _ in range(EPOCHS):
        yield map(len, _grouped(((sample["jpg"],) for sample in dataset), work.batch))


def mosaic_pillow(place: Place, cache: Path, work: Work) -> Epochs:
    """Pillow decodes in the DataLoader's worker processes."""
    from torch.utils.data import DataLoader

    pixels = partial(_pixels, _pixels_of(work))
    dataset = _mosaic(place, cache, work, lambda sample: pixels(sample["jpg"]))
    loader = DataLoader(dataset, work.batch, num_workers=work.threads, persistent_workers=True, **FORK)
    for _ in range(EPOCHS):
        yield map(len, loader)


def _mosaic(place: Place, cache: Path, work: Work, made: Callable[[Any], Any] = lambda sample: sample) -> Any:
    """made: sample -> what the dataset gives."""
    base: Any = importlib.import_module("streaming").StreamingDataset

    class Images(base):
        def __getitem__(self, at: Any) -> Any:
            return made(super().__getitem__(at))

    return Images(remote=place.mds, local=str(cache), shuffle=True, batch_size=work.batch)


# -- Pillow ------------------------------------------------------------------------------------------------------------


def _pixels_of(work: Work) -> Pixels:
    return Pixels(work.size, IMAGENET_MEAN, IMAGENET_STD)


def _pixels(pixels: Pixels, encoded: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(encoded)) as image:
        return pixels(image)
