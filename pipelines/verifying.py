"""Whether a dataset can be trained on: each shard's hash, each image's checksum, size and decode. A task a shard."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import BinaryIO

from pipelines.checking import Checked, checked
from pipelines.dataset import AGAIN, Dataset, Shard
from pipelines.errors import DataError
from pipelines.index import BLOCK, Index, key_of
from pipelines.packing.opened import opened
from pipelines.packing.run import Run, Tell
from pipelines.quarantine import CHECKSUM
from pipelines.sources import BadImage, Item, Progress

FEW = 4000  # images that one process checks before others have imported what they need


def check_images(dataset: Dataset, progress: Progress, run: Run, hashes: bool = False) -> None:
    """Reads and decodes every image; `progress(split, done, in all)` hears of them. hashes: and those of the shards.

    A shard is read once, a remote one into a temporary file. Raises DataError with a line for each image that cannot
    be trained on.
    """
    done = dict.fromkeys(dataset.splits, 0)

    def tell(task: ShardCheck, more: int) -> None:
        done[task.split] += more
        progress(task.split, done[task.split], dataset.splits[task.split].samples)

    found = {(task.split, task.number): lines for task, lines in run(_check, _tasks(dataset, hashes), tell)}
    if bad := [line for _, lines in sorted(found.items()) for line in lines]:
        raise DataError("\n".join([*bad, f"{len(bad)} bad images in {dataset.place}; {AGAIN}"]))


@dataclass(frozen=True)
class ShardCheck:
    """The task of checking a shard."""

    split: str
    number: int
    shard: Shard
    where: str
    records: Index = field(repr=False)
    endpoint: str
    hashes: bool

    def __str__(self) -> str:
        return self.where


def _tasks(dataset: Dataset, hashes: bool) -> Iterator[ShardCheck]:
    for name, split in dataset.splits.items():
        records, first = dataset.index(name), 0
        for number, shard in enumerate(split.shards):
            part = records[first : first + shard.samples]
            first += shard.samples
            yield ShardCheck(name, number, shard, dataset.locate(shard.name), part, dataset.objects.endpoint, hashes)


def _check(task: ShardCheck, tell: Tell, threads: int) -> list[str]:
    """A line for each bad image."""
    with opened(task.where, task.shard.bytes, task.endpoint) as (file, sha256):
        if task.hashes and sha256 != task.shard.sha256:
            raise DataError(f"shard {task.where} does not match its checksum in dataset.json; {AGAIN}")
        bad = []
        with closing(checked(_items(file, task.records), threads)) as images:
            for record, image in zip(task.records, images, strict=True):
                if fault := _fault(record, image):
                    bad.append(f"{_key(file, record)} in {task.shard.name} cannot be trained on: {fault}")
                tell(1)
        return bad


def _items(file: BinaryIO, records: Index) -> Iterator[Item]:
    for row, record in enumerate(records):
        yield Item(str(row), int(record["label"]), _load(file, record))


def _load(file: BinaryIO, record: Index) -> Callable[[], bytes]:
    def load() -> bytes:
        file.seek(int(record["block"]) * BLOCK)
        data = file.read(int(record["size"]))
        if len(data) != record["size"] or zlib.crc32(data) != record["crc32"]:
            raise BadImage(CHECKSUM)
        return data

    return load


def _fault(record: Index, image: Checked) -> str:
    wrong = not image.fault and (image.height, image.width) != record.tolist()[-2:]
    return "its size is not the index's" if wrong else image.fault


def _key(file: BinaryIO, record: Index) -> str:
    file.seek((int(record["block"]) - 1) * BLOCK)
    return key_of(file.read(BLOCK), int(record["block"]))
