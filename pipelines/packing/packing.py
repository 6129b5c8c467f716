"""From a source to shards: the shuffled order is cut by items, so that each shard is made by itself, alike anywhere."""

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.packing.done import Done
from pipelines.packing.resize import Resize
from pipelines.packing.run import Tell
from pipelines.packing.tar import TarWriter
from pipelines.packing.target import Target
from pipelines.packing.unfinished import Bad, Contents, tar_name
from pipelines.sources import Item, Source

if TYPE_CHECKING:
    from pipelines.checking import Checked

FEW = 4000  # images that one process packs before others have imported what they need


def made_of(source: Mapping[str, Any], seed: int, shard_samples: int, resize: Resize | None) -> dict[str, Any]:
    """How a dataset is made, for dataset.json."""
    made = {**source, "shuffle_seed": seed, "shard_samples": shard_samples}
    return made | ({"resize": resize.made} if resize else {})


@dataclass(frozen=True)
class Packing:
    """The job of packing a source. Shard k holds items k * shard_samples .. of the shuffled order."""

    source: Source
    seed: int
    shard_samples: int
    resize: Resize | None = None
    adopts: ClassVar[bool] = False

    @cached_property
    def made(self) -> Mapping[str, Any]:
        """See Job."""
        return made_of(self.source.made, self.seed, self.shard_samples, self.resize)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Items of each split."""
        return {name: len(items) for name, items in self.source.splits.items()}

    @cached_property
    def shards(self) -> Mapping[str, int]:
        """How many shards each split has."""
        return {name: -(-size // self.shard_samples) for name, size in self.sizes.items()}

    @property
    def few(self) -> bool:
        """See Job."""
        return sum(self.sizes.values()) < FEW

    @property
    def paths(self) -> Sequence[Path]:
        """See Job."""
        return self.source.paths

    def size(self, split: str, number: int) -> int:
        """Items of a shard."""
        return len(self._rows(split, number))

    def task(self, split: str, number: int) -> "Shard":
        """The items of one shard, and nothing else: it may go far."""
        items, rows = self.source.splits[split], self._rows(split, number)
        return Shard(split, number, number * self.shard_samples, tuple(items[int(i)] for i in rows), self.resize)

    def refusal(self, split: str, name: str, reason: str) -> DataError:
        """See Job."""
        return refusal(split, name, reason)

    def contents(self, shards: Mapping[str, Sequence[Done]]) -> Contents:
        """See Job."""
        return Contents(self.source.classes, shards)

    def _rows(self, split: str, number: int) -> NDArray[np.int64]:
        return self._orders[split][number * self.shard_samples : (number + 1) * self.shard_samples]

    @cached_property
    def _orders(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: shuffled(size, self.seed) for name, size in self.sizes.items()}


def refusal(split: str, name: str, reason: str) -> DataError:
    """What --bad refuse says of an image."""
    return DataError(
        f"{name} in {split} is not an image that can be decoded ({reason}); remove or repair it, or leave such images "
        "out with --bad skip"
    )


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """The order in which `count` items are packed."""
    return np.random.Philox(key=[seed, count]).random_raw(count).argsort(kind="stable")


@dataclass(frozen=True)
class Shard:
    """The task of writing one tar."""

    split: str
    number: int
    first: int  # place of its first item in the split's order
    items: tuple[Item, ...]
    resize: Resize | None

    def __str__(self) -> str:
        return tar_name(self.split, self.number)

    def run(self, target: Target, bad: Bad, tell: Tell, threads: int) -> Done:
        """See Task; `tell` hears of each image. Memory: some dozens of images, decoded."""
        from pipelines.checking import checked  # imports torch: not for those who only ask whether it is packed

        left_out = []
        images = checked(self.items, threads, pixels=self.resize is not None)
        with closing(images), target.staged(str(self)) as staged:
            tar = TarWriter(staged.file)
            for place, image in enumerate(map(self._stored, images), self.first):
                if not image.fault:
                    tar.add(_key(place, image.item), image.data, image.item.label, image.height, image.width)
                elif bad == "skip":
                    left_out.append((image.item.name, image.fault))
                else:
                    raise refusal(self.split, image.item.name, image.fault)
                tell(1)
            records, sha256 = tar.finish()
            if len(records):
                staged.keep()
        return Done(str(self), tar.bytes, sha256, records, tuple(left_out))

    def _stored(self, image: "Checked") -> "Checked":
        return self.resize(image) if self.resize else image


def _key(place: int, item: Item) -> str:
    """A unique key; dots and slashes mean something to WebDataset, so only plain characters of the name are kept."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", item.name.rsplit(".", 1)[0])[-60:]
    return f"{place:08d}-{stem}"
