"""Packing: images -> shuffled WebDataset tars, an index a split, and dataset.json, which makes it a dataset.

Written beside the target in a hidden folder and renamed at the end: a packer that is killed leaves nothing that looks
like a dataset, and the next one clears away what it left.
"""

import fcntl
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.dataset import MANIFEST, Dataset, Shard, Split, file_sha256, manifest, open_dataset, verify
from pipelines.errors import ConfigError, DataError
from pipelines.index import BLOCK, RECORD, Index, write_index
from pipelines.sources import Item, Source

Progress = Callable[[str, int, int], None]  # split, images done, images in all


def pack(source: Source, out: Path, *, seed: int, shard_samples: int, progress: Progress) -> Dataset:
    """Packs `source` into the folder `out`, which must not exist or hold nothing.

    Raises ConfigError where `out` is in use or cannot be written, DataError where an image cannot be read or decoded;
    then nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a dataset that was made in another way" if (out / MANIFEST).exists() else "something else"
        raise ConfigError(f"--out {out} holds {what}; name a new folder, or remove it")
    try:
        with _partial(out) as partial:
            splits = {
                name: _split(partial, name, items, seed, shard_samples, progress)
                for name, items in source.splits.items()
            }
            document = manifest(source.classes, splits, _made(source.made, seed, shard_samples))
            (partial / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
            if out.exists():
                out.rmdir()
            partial.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}; name another folder") from error
    return open_dataset(out)


def packed_alike(made: Mapping[str, Any], out: Path, *, seed: int, shard_samples: int) -> Dataset | None:
    """The dataset in `out`, if it was made in this way. Raises DataError where it was, and is no longer whole."""
    if not (out / MANIFEST).is_file():
        return None
    found = open_dataset(out)
    if found.made != _made(made, seed, shard_samples):
        return None
    verify(found, "size")
    return found


def _made(source: Mapping[str, Any], seed: int, shard_samples: int) -> dict[str, Any]:
    return {**source, "shuffle_seed": seed, "shard_samples": shard_samples}


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` for this process alone; gone afterwards unless it was renamed."""
    partial = out.parent / f".{out.name}.packing"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when a packer is killed
        except BlockingIOError:
            raise ConfigError(f"--out {out} is being packed by another process; wait for it, or name another") from None
        for left in partial.iterdir():
            left.unlink()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _split(folder: Path, name: str, items: Sequence[Item], seed: int, shard_samples: int, progress: Progress) -> Split:
    """Shuffles, cuts into shards, writes them and their index."""
    order = np.random.Philox(key=[seed, len(items)]).random_raw(len(items)).argsort(kind="stable")
    shards, records = [], []
    for number, first in enumerate(range(0, len(items), shard_samples)):
        rows = order[first : first + shard_samples]
        path = folder / f"{name}-{number:06d}.tar"
        chosen = [items[i] for i in rows]
        records.append(_shard(path, number, first, chosen, lambda done: progress(name, done, len(items))))
        shards.append(Shard(path.name, len(rows), path.stat().st_size, file_sha256(path)))
    index = f"{name}.index"
    return Split(name, tuple(shards), index, write_index(folder / index, np.concatenate(records)))


def _shard(path: Path, number: int, first: int, items: Sequence[Item], done: Callable[[int], None]) -> Index:
    """One tar; its records. done: hears how many images of the split are written."""
    from webdataset import TarWriter  # imports torch: not for those who only read

    sizes = []
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for i, item in enumerate(items):
            data = _load(item)
            sizes.append(_size(item, data))
            tar.write({"__key__": _key(first + i, item), "jpg": data, "cls": str(item.label).encode()})
            done(first + i + 1)
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


def _load(item: Item) -> bytes:
    try:
        return item.load()
    except OSError as error:
        raise DataError(f"{item.name} cannot be read: {error.strerror}; remove or repair it") from error


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
