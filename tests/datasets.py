"""Small datasets for tests, and ways to damage them."""

import hashlib
import json
import os
import zlib
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.dataset import Dataset, open_dataset
from pipelines.index import BLOCK, RECORD
from pipelines.pack import pack
from pipelines.reader import Reader
from pipelines.sources import Item, Source
from tests.jpegs import jpeg

# Real data that does not belong into a repository: a small ImageNet, CIFAR-10. Tests that need it skip without it.
SHARED = Path(os.environ.get("SKIPLANE_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
MINI = SHARED / "mini-ilsvrc"
MINI_TARS = {
    "train": MINI / "ILSVRC2012_img_train.tar",
    "val": MINI / "ILSVRC2012_img_val.tar",
    "devkit": MINI / "ILSVRC2012_devkit_t12.tar.gz",
}
CIFAR10_ZIP = SHARED / "cifar10-jpeg.zip"


def source(train: int = 40, val: int = 10, classes: int = 4) -> Source:
    """Images of many sizes; the label of image i is i % classes."""

    def items(first: int, count: int) -> list[Item]:
        seeds = range(first, first + count)
        return [Item(f"image-{s}.jpg", s % classes, partial(jpeg, s, 40 + 7 * s % 60, 50 + 11 * s % 70)) for s in seeds]

    splits = {"train": items(0, train), "val": items(1000, val)}
    return Source(tuple("abcdefgh"[:classes]), splits, {"source": "test"})


def make(root: Path, shard_samples: int = 8, **counts: int) -> Dataset:
    return pack(source(**counts), root, seed=0, shard_samples=shard_samples, progress=lambda *_: None)


def overwrite(dataset: Dataset, split: str, sample: int, data: bytes, index_too: bool = True) -> None:
    """Puts other bytes (no more than there were) in a sample's place; index_too: as if they had been packed so."""
    path = dataset.root / dataset.splits[split].index
    records = np.fromfile(path, RECORD)
    record = records[sample]
    assert len(data) <= record["size"]
    shard = dataset.root / dataset.splits[split].shards[record["shard"]].name
    with shard.open("r+b") as file:
        file.seek(int(record["block"]) * BLOCK)
        file.write(data)
    if index_too:
        records["size"][sample], records["crc32"][sample] = len(data), zlib.crc32(data)
        records.tofile(path)
        seal(dataset.root, split, path)


def garble(dataset: Dataset, split: str, sample: int) -> None:
    """Flips bits in the middle of a sample's scan: it still decodes, to another picture; its checksum tells."""
    with closing(Reader(dataset, split)) as reader:
        data = reader.read([sample]).image(0).tobytes()
    middle = (data.rindex(b"\xff\xda") + len(data)) // 2
    flipped = bytes(byte ^ 0x15 for byte in data[middle : middle + 9])
    overwrite(dataset, split, sample, data[:middle] + flipped + data[middle + 9 :], index_too=False)


def edit(root: Path, **changes) -> None:
    """Changes fields of dataset.json."""
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal(root: Path, split: str, index: Path) -> None:
    splits = json.loads((root / "dataset.json").read_text())["splits"]
    splits[split]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    edit(root, splits=splits)


def reopened(dataset: Dataset) -> Dataset:
    return open_dataset(dataset.root)
