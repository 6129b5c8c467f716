"""Packing: images -> shuffled WebDataset tars, an index a split, and dataset.json, which makes it a dataset.

Written beside the target in a hidden folder and renamed at the end: a packer that is killed leaves nothing that looks
like a dataset.
"""

import io
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.dataset import MANIFEST, Dataset, Shard, Split, file_sha256, manifest, open_dataset
from pipelines.errors import ConfigError, DataError
from pipelines.index import BLOCK, RECORD, Index, write_index
from pipelines.sources import Item, Source

Progress = Callable[[str, int, int], None]  # split, images done, images in all


def pack(source: Source, out: Path, *, seed: int, shard_samples: int, progress: Progress) -> Dataset:
    """Packs `source` into the folder `out`, which must not exist or hold nothing.

    Raises ConfigError where `out` is in use, DataError where an image cannot be decoded; then nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is in use by something else; name a new folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.packing"
    shutil.rmtree(partial, ignore_errors=True)  # of a packer that was killed
    partial.mkdir()
    try:
        splits = {
            name: _split(partial, name, items, seed, shard_samples, progress) for name, items in source.splits.items()
        }
        made = {**source.made, "shuffle_seed": seed, "shard_samples": shard_samples}
        (partial / MANIFEST).write_text(json.dumps(manifest(source.classes, splits, made), indent=1) + "\n")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_dataset(out)


def packed_alike(source: Source, out: Path, *, seed: int, shard_samples: int) -> Dataset | None:
    """The dataset in `out`, if it was made from the same source in the same way."""
    if not (out / MANIFEST).is_file():
        return None
    found = open_dataset(out)
    made = {**source.made, "shuffle_seed": seed, "shard_samples": shard_samples}
    same = found.made == made and found.classes == source.classes
    counts = {name: len(items) for name, items in source.splits.items()}
    return found if same and counts == {name: split.samples for name, split in found.splits.items()} else None


def _split(folder: Path, name: str, items: Sequence[Item], seed: int, shard_samples: int, progress: Progress) -> Split:
    """Shuffles, cuts into shards, writes them and their index."""
    order = np.random.Philox(key=[seed, len(items)]).random_raw(len(items)).argsort(kind="stable")
    shards, records = [], []
    for number, first in enumerate(range(0, len(items), shard_samples)):
        rows = order[first : first + shard_samples]
        path = folder / f"{name}-{number:06d}.tar"
        records.append(_shard(path, number, first, [items[i] for i in rows]))
        shards.append(Shard(path.name, len(rows), path.stat().st_size, file_sha256(path)))
        progress(name, first + len(rows), len(items))
    index = f"{name}.index"
    return Split(name, tuple(shards), index, write_index(folder / index, np.concatenate(records)))


def _shard(path: Path, number: int, first: int, items: Sequence[Item]) -> Index:
    """One tar; its records."""
    from webdataset import TarWriter  # imports torch: not for those who only read

    sizes = []
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for i, item in enumerate(items):
            data = item.load()
            sizes.append(_size(item, data))
            tar.write({"__key__": _key(first + i, item), "jpg": data, "cls": str(item.label).encode()})
    return index_tar(path, number, sizes)


def index_tar(path: Path, number: int, sizes: Sequence[tuple[int, int]]) -> Index:
    """The records of a tar, from its headers: whoever wrote it. `sizes`: height and width of each image in order."""
    records = np.zeros(len(sizes), RECORD)
    labels: dict[str, int] = {}
    rows: dict[str, int] = {}
    with tarfile.open(path) as tar, path.open("rb") as raw:
        for member in tar:
            key, extension = member.name.rsplit(".", 1)
            data = _read(raw, member)
            if extension == "cls":
                labels[key] = int(data)
                continue
            row = rows[key] = len(rows)
            records[row] = (number, member.offset_data // BLOCK, member.size, zlib.crc32(data), 0, *sizes[row])
    for key, row in rows.items():
        records[row]["label"] = labels[key]
    return records


def _read(raw: io.BufferedReader, member: tarfile.TarInfo) -> bytes:
    raw.seek(member.offset_data)
    return raw.read(member.size)


def _size(item: Item, data: bytes) -> tuple[int, int]:
    """Decodes the image once; returns its stored height and width in px."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            width, height = image.size
    except Exception as error:  # Pillow raises many kinds; each means the same
        raise DataError(f"{item.name} is not an image that can be decoded ({error}); remove or repair it") from error
    if max(height, width) > 65535:
        raise DataError(f"{item.name} has {width} x {height} px; at most 65535 a side are allowed")
    return height, width


def _key(number: int, item: Item) -> str:
    """A unique key; dots and slashes mean something to WebDataset, so only plain characters of the name are kept."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", item.name.rsplit(".", 1)[0])[-60:]
    return f"{number:08d}-{stem}"
