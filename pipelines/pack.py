"""Packing: images -> shuffled WebDataset tars, an index a split, and dataset.json, which makes it a dataset.

Written beside the target in a hidden folder and renamed at the end: a packer that is killed leaves nothing that looks
like a dataset, and the next one clears away what it left. Images stream through: a few dozen are in memory at once,
whatever the size of the set.
"""

import fcntl
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipelines.dataset import MANIFEST, Dataset, Shard, Split, file_sha256, manifest, open_dataset, verify
from pipelines.errors import ConfigError, DataError
from pipelines.index import BLOCK, RECORD, Index, write_index
from pipelines.sources import Item, Items, Progress, Source

if TYPE_CHECKING:
    from pipelines.checking import Checked

Bad = Literal["refuse", "skip"]  # what happens to images that cannot be decoded
LeftOut = dict[str, str]  # split, name, reason


def pack(
    source: Source,
    out: Path,
    *,
    seed: int,
    shard_samples: int,
    progress: Progress,
    bad: Bad = "refuse",
    threads: int = 2,
) -> Dataset:
    """Packs `source` into the folder `out`, which must not exist or hold nothing. threads: that decode.

    Images that cannot be decoded are listed under `left_out` of what `made` says, or refused. `progress` hears of each
    image that is done with. Raises ConfigError where `out` is in use or cannot be written, DataError where an image
    cannot be read or is refused; then nothing is left behind.
    """
    from pipelines.checking import checked  # imports torch: not for those who only ask whether it is packed

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a dataset that was made in another way" if (out / MANIFEST).exists() else "something else"
        raise ConfigError(f"--out {out} holds {what}; name a new folder, or remove it")
    left_out: list[LeftOut] = []
    splits = {}
    try:
        with _partial(out) as partial:
            for name, items in source.splits.items():
                with closing(checked(_shuffled(items, seed), threads)) as images:
                    good = _good(images, name, len(items), bad, left_out, progress)
                    splits[name] = _split(partial, name, good, shard_samples)
            document = manifest(source.classes, splits, _made(source.made, seed, shard_samples, left_out))
            (partial / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
            if out.exists():
                out.rmdir()
            partial.rename(out)
    except OSError as error:  # what is read has errors of its own by now
        raise ConfigError(
            f"--out {out} cannot be written: {error.strerror}; make room, or name another folder"
        ) from error
    return open_dataset(out)


def packed_alike(
    made: Mapping[str, Any], out: Path, *, seed: int, shard_samples: int, bad: Bad = "refuse"
) -> Dataset | None:
    """The dataset in `out`, if it was made in this way. Raises DataError where it was, and is no longer whole."""
    if not (out / MANIFEST).is_file():
        return None
    found = open_dataset(out)
    left_out = left_out_of(found)
    if found.made != _made(made, seed, shard_samples, left_out) or (left_out and bad == "refuse"):
        return None
    verify(found, "size")
    return found


def left_out_of(dataset: Dataset) -> list[LeftOut]:
    """The images that were left out when a dataset was packed: split, name and reason of each."""
    return list(dataset.made.get("left_out", ()))


def _made(source: Mapping[str, Any], seed: int, shard_samples: int, left_out: Sequence[LeftOut]) -> dict[str, Any]:
    made = {**source, "shuffle_seed": seed, "shard_samples": shard_samples}
    names = sorted(left_out, key=lambda one: (one["split"], one["name"]))
    return {**made, "left_out": names} if names else made


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


def _shuffled(items: Items, seed: int) -> Iterator[Item]:
    order = np.random.Philox(key=[seed, len(items)]).random_raw(len(items)).argsort(kind="stable")
    return (items[int(i)] for i in order)


def _good(
    images: Iterable["Checked"], split: str, total: int, bad: Bad, left_out: list[LeftOut], progress: Progress
) -> Iterator["Checked"]:
    """Those that decode; the others are added to `left_out`, or the first one is refused with DataError."""
    for done, image in enumerate(images, 1):
        if not image.fault:
            yield image
        elif bad == "skip":
            left_out.append({"split": split, "name": image.item.name, "reason": image.fault})
        else:
            raise DataError(
                f"{image.item.name} in {split} is not an image that can be decoded ({image.fault}); remove or repair "
                "it, or leave such images out with --bad skip"
            )
        progress(split, done, total)  # whoever asks for the next one has written this one


def _split(folder: Path, name: str, images: Iterator["Checked"], shard_samples: int) -> Split:
    """Cuts into shards, writes them and their index."""
    shards: list[Shard] = []
    records: list[Index] = []
    written = 0
    while part := _shard(folder / f"{name}-{len(shards):06d}.tar", len(shards), written, images, shard_samples):
        shard, index = part
        shards.append(shard)
        records.append(index)
        written += len(index)
    if not shards:
        raise DataError(f"no image of {name} can be decoded; look at the source")
    index_name = f"{name}.index"
    return Split(name, tuple(shards), index_name, write_index(folder / index_name, np.concatenate(records)))


def _shard(
    path: Path, number: int, first: int, images: Iterator["Checked"], samples: int
) -> tuple[Shard, Index] | None:
    """One tar of the next `samples` images, and its records; None where there are no more."""
    from webdataset import TarWriter  # imports torch too

    begins = next(images, None)
    if begins is None:
        return None
    sizes = []
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for i, image in enumerate(itertools.chain([begins], itertools.islice(images, samples - 1))):
            sizes.append((image.height, image.width))
            label = str(image.item.label).encode()
            tar.write({"__key__": _key(first + i, image.item), "jpg": image.data, "cls": label})
    index = index_tar(path, number, sizes)
    return Shard(path.name, len(index), path.stat().st_size, file_sha256(path)), index


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


def _key(number: int, item: Item) -> str:
    """A unique key; dots and slashes mean something to WebDataset, so only plain characters of the name are kept."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", item.name.rsplit(".", 1)[0])[-60:]
    return f"{number:08d}-{stem}"
