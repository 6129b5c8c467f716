"""Tars that somebody else wrote become a dataset: they are read and checked, an index is made, no byte is changed."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from pipelines.errors import DataError
from pipelines.index import BLOCK, RECORD
from pipelines.packing.done import Done
from pipelines.packing.labels import name_classes, order_chi2
from pipelines.packing.opened import opened
from pipelines.packing.run import Tell
from pipelines.packing.target import Target
from pipelines.packing.unfinished import Bad, Contents
from pipelines.remote.url import is_url
from pipelines.sources import BadImage, Item
from pipelines.sources.samples import Rule, Sample, read_samples
from pipelines.sources.tars import Tar

FEW = 400_000_000  # bytes that one process reads before others have imported what they need


@dataclass(frozen=True)
class Adopting:
    """The job of adopting tars; progress counts their bytes."""

    tars: Mapping[str, Sequence[Tar]]  # by split
    rule: Rule
    endpoint: str = ""
    adopts: ClassVar[bool] = True

    @cached_property
    def made(self) -> Mapping[str, Any]:
        """See Job; the names and sizes of the tars tell them from others without reading them."""
        listing = "".join(f"{split} {tar.name} {tar.size}\n" for split, tars in self.tars.items() for tar in tars)
        made = {"source": "tars", "image": list(self.rule.images), "label": list(self.rule.labels)}
        names = "\n".join(self.rule.classes)
        made |= {"classes_sha256": hashlib.sha256(names.encode()).hexdigest()} if names else {}
        return made | {"listing_sha256": hashlib.sha256(listing.encode()).hexdigest()}

    @cached_property
    def shards(self) -> Mapping[str, int]:
        """Tars of each split."""
        return {split: len(tars) for split, tars in self.tars.items()}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each split."""
        return {split: sum(tar.size for tar in tars) for split, tars in self.tars.items()}

    @property
    def few(self) -> bool:
        """See Job."""
        return sum(self.sizes.values()) < FEW

    @property
    def paths(self) -> Sequence[Path]:
        """See Job."""
        return [Path(tar.where) for tars in self.tars.values() for tar in tars if not is_url(tar.where)]

    def size(self, split: str, number: int) -> int:
        """Bytes of a tar."""
        return self.tars[split][number].size

    def task(self, split: str, number: int) -> "ForeignTar":
        """See Job."""
        return ForeignTar(split, number, self.tars[split][number], self.rule, self.endpoint)

    def refusal(self, split: str, name: str, reason: str) -> DataError:
        """See Job."""
        return refusal(split, name, reason)

    def contents(self, shards: Mapping[str, Sequence[Done]]) -> Contents:
        """See Job; measures the order of the training tars."""
        labels = dict.fromkeys(label for dones in shards.values() for done in dones for label in done.labels)
        classes, numbers = name_classes(list(labels), self.rule.classes)
        shards = {split: [done.labelled(numbers) for done in dones] for split, dones in shards.items()}
        chi2 = order_chi2([done.records["label"] for done in shards["train"] if len(done.records)])
        return Contents(classes, shards, {} if chi2 is None else {"order_chi2": chi2})


@dataclass(frozen=True)
class ForeignTar:
    """The task of reading one tar."""

    split: str
    number: int
    tar: Tar
    rule: Rule
    endpoint: str

    def __str__(self) -> str:
        return self.tar.name

    def run(self, target: Target, bad: Bad, tell: Tell, threads: int) -> Done:
        """See Task; `tell` hears of bytes. Raises DataError where the tar is not plain and whole."""
        with opened(self.tar.where, self.tar.size, self.endpoint) as (file, sha256):
            found = _Found(self.rule, file)
            samples = sorted(read_samples(file, self.tar.size, self.tar.where), key=found.begin)
            left_out = self._index(samples, found, bad, tell, threads)
        return Done(self.tar.name, self.tar.size, sha256, np.array(found.rows, RECORD), left_out, tuple(found.labels))

    def _index(
        self, samples: Sequence[Sample], found: "_Found", bad: Bad, tell: Tell, threads: int
    ) -> tuple[tuple[str, str], ...]:
        from pipelines.checking import checked  # imports torch

        left_out, told = [], 0
        with closing(checked(map(found.item, samples), threads)) as images:
            for sample, image in zip(samples, images, strict=True):
                name = f"{self.tar.name.rpartition('/')[2]}/{sample.key}"
                if not image.fault:
                    found.add(sample, image.data, image.height, image.width)
                elif bad == "skip":
                    left_out.append((name, image.fault))
                else:
                    raise refusal(self.split, name, image.fault)
                tell(max(0, found.begin(sample) - told))
                told = max(told, found.begin(sample))
        tell(self.tar.size - told)
        return tuple(left_out)


class _Found:
    """The records of a tar, and the labels that they stand for."""

    def __init__(self, rule: Rule, file: BinaryIO) -> None:
        self._rule, self._file = rule, file
        self.rows: list[tuple[int, ...]] = []
        self.labels: dict[str, int] = {}

    def begin(self, sample: Sample) -> int:
        """Where its image lies; 0 where it has none."""
        try:
            return self._rule.image(sample).offset
        except BadImage:
            return 0

    def item(self, sample: Sample) -> Item:
        """What loads its image; what is wrong with the sample is found first."""
        return Item(sample.key, 0, partial(self._load, sample))

    def _load(self, sample: Sample) -> bytes:
        image = self._rule.image(sample)
        self._rule.label(sample, self._file)
        return image.read(self._file)

    def add(self, sample: Sample, data: bytes, height: int, width: int) -> None:
        """One that is good."""
        image, label = self._rule.image(sample), self._rule.label(sample, self._file)
        number = self.labels.setdefault(label, len(self.labels))
        self.rows.append((0, image.offset // BLOCK, image.size, zlib.crc32(data), number, height, width))


def refusal(split: str, name: str, reason: str) -> DataError:
    """What --bad refuse says of a sample."""
    return DataError(
        f"{name} in {split} cannot be used ({reason}); repair its tar, or leave such samples out with --bad skip"
    )
