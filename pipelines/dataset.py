"""`dataset.json`: what a dataset is made of. A dataset is a folder with it, WebDataset tars, and an index a split."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import DataError
from pipelines.index import Index, read_index

FORMAT = 1
MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Shard:
    """One tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Training or validation."""

    name: str
    shards: tuple[Shard, ...]
    index: str  # file name
    index_sha256: str

    @property
    def samples(self) -> int:
        """Of all shards."""
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A dataset that was opened; `digest` names its content, not its place."""

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    made: Mapping[str, Any]  # how: source and settings of the packer
    digest: str

    def index(self, split: str) -> Index:
        """The records of a split, checked. Raises DataError."""
        part = self.splits[split]
        records = read_index(self.root / part.index, part.index_sha256)
        if len(records) != part.samples:
            raise DataError(f"index {self.root / part.index} has {len(records)} records for {part.samples} samples")
        return records


def open_dataset(root: str | Path) -> Dataset:
    """Reads and checks dataset.json. Raises DataError, one sentence for each thing that may be wrong."""
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise DataError(f"{root} {_lack(Path(root))}; pack a dataset there first (python -m jobs.pack --help)")
    try:
        document = json.loads(path.read_text())
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a dataset's manifest: {type(error).__name__}; pack the dataset again"
        ) from error
    if version != FORMAT:
        raise DataError(f"{path} has format version {version}; this Skiplane reads {FORMAT}: pack the dataset again")
    return _parse(Path(root), document)


def manifest(classes: tuple[str, ...], splits: Mapping[str, Split], made: Mapping[str, Any]) -> dict[str, Any]:
    """The document that `open_dataset` reads."""
    parts = {name: asdict(split) for name, split in splits.items()}
    return {"format": FORMAT, "classes": list(classes), "splits": parts, "made": dict(made)}


def verify(
    dataset: Dataset, how: Literal["size", "sha256"], progress: Callable[[str, int], None] | None = None
) -> None:
    """Checks every shard's size, or its hash. `progress(shard, bytes)` hears of each. Raises DataError."""
    for split in dataset.splits.values():
        read_index(dataset.root / split.index, split.index_sha256)
        for shard in split.shards:
            _check(dataset.root / shard.name, shard, how)
            if progress:
                progress(shard.name, shard.bytes)


def _lack(root: Path) -> str:
    if not root.is_dir():
        return "is no folder" if root.exists() else "does not exist"
    return f"has no {MANIFEST}" if any(root.iterdir()) else "is empty"


def _check(path: Path, shard: Shard, how: str) -> None:
    again = "copy or pack the dataset again"
    if not path.is_file():
        raise DataError(f"shard {path} is missing; {again}")
    if (size := path.stat().st_size) != shard.bytes:
        raise DataError(f"shard {path} has {size:,} bytes, dataset.json says {shard.bytes:,}; {again}")
    if how == "sha256" and file_sha256(path) != shard.sha256:
        raise DataError(f"shard {path} does not match its checksum in dataset.json; {again}")


def file_sha256(path: Path) -> str:
    """sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(root: Path, document: Mapping[str, Any]) -> Dataset:
    try:
        classes = tuple(str(c) for c in document["classes"])
        splits = {name: _split(part) for name, part in document["splits"].items()}
        made = document["made"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / MANIFEST} lacks {error}; pack the dataset again") from error
    if missing := {"train", "val"} - set(splits):
        raise DataError(f"{root / MANIFEST} has no split '{min(missing)}'; train and val are needed")
    return Dataset(root, classes, splits, made, _digest(classes, splits))


def _split(part: Mapping[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in part["shards"])
    for name in (part["index"], *(shard.name for shard in shards)):
        if Path(name).name != name or name == "..":
            raise DataError(f"{MANIFEST} names the file '{name}'; only names inside the dataset's folder are allowed")
    return Split(part["name"], shards, part["index"], part["index_sha256"])


def _digest(classes: tuple[str, ...], splits: Mapping[str, Split]) -> str:
    content = {"classes": classes, "splits": {name: asdict(splits[name]) for name in sorted(splits)}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
