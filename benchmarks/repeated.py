"""Real images as a dataset of any size: those of class folders or of a packed dataset, over and over, shuffled."""

from contextlib import closing
from functools import partial
from pathlib import Path

from pipelines.dataset import MANIFEST, Dataset, open_dataset
from pipelines.pack import pack
from pipelines.reader import Reader
from pipelines.sources import Item, Items, Source
from pipelines.sources.folder import folder

VAL = 8  # images; nothing here evaluates, a dataset has them


def repeated(data: Path, out: Path, images: int, shard_samples: int) -> Dataset:
    """Packs `images` training images from `data` into `out`. Shards differ, each image is in several. Raises DataError.

    Costs a decode an image, which packing checks, and 110 KB of disk.
    """
    with closing(_Images(data)) as found:
        train = [Item(f"{i:07d}.jpg", item.label, item.load) for i, item in enumerate(found.times(images))]
        splits = {"train": train, "val": train[:VAL]}
        source = Source(found.classes, splits, {"source": "repeated"})
        return pack(source, out, seed=0, shard_samples=shard_samples, progress=lambda *_: None)


class _Images:
    """The training images of `data`."""

    def __init__(self, data: Path) -> None:
        self._reader: Reader | None = None
        if (data / MANIFEST).exists():
            dataset = open_dataset(data)
            self._reader, self.classes = Reader(dataset, "train"), dataset.classes
            labels = dataset.index("train")["label"].tolist()
            self._items: Items = [Item(str(i), label, partial(self._read, i)) for i, label in enumerate(labels)]
        else:
            source = folder(data, data)
            self._items, self.classes = source.splits["train"], source.classes

    def times(self, images: int) -> list[Item]:
        """So many of them, from the first on, again and again."""
        return [self._items[i % len(self._items)] for i in range(images)]

    def close(self) -> None:
        if self._reader:
            self._reader.close()

    def _read(self, sample: int) -> bytes:
        assert self._reader
        return self._reader.read([sample]).image(0).tobytes()
