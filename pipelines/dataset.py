"""`dataset.json`: what a dataset is made of. A dataset is a folder or URL with it, WebDataset tars, an index a split.

The tars may lie elsewhere, in a bucket that somebody else laid out: then they are named by their URLs.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from pipelines.errors import DataError
from pipelines.index import RECORD, Index, index_fault, parse_index
from pipelines.remote.failures import NotThere
from pipelines.remote.objects import Objects
from pipelines.remote.url import is_url, split_url

FORMAT = 1
MANIFEST = "dataset.json"
UNFINISHED = ".packing"  # what packing keeps beside it until it is there
CUT_SHORT = "is being packed, or packing was cut short; give the jobs.pack command again"
ASKED_AT_ONCE = 64  # sizes, of a server
AGAIN = "copy or pack the dataset again"


@dataclass(frozen=True)
class Shard:
    """One tar: a file name in the dataset's folder, or the URL (file:// among them) where it lies."""

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
    def starts(self) -> tuple[int, ...]:
        """The first sample id of each shard, and the number of all samples."""
        return (0, *itertools.accumulate(self.counts))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A dataset that was opened; `digest` names its content, not its place."""

    place: str  # folder or URL
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    made: Mapping[str, Any]  # how: source and settings of the packer
    digest: str
    objects: Objects = field(default_factory=Objects, compare=False, repr=False)  # what reads it

    @property
    def root(self) -> Path:
        """The folder of a dataset that lies in one."""
        return Path(self.place)

    def locate(self, name: str) -> str:
        """The path or URL of a shard or an index."""
        if name.startswith("file://"):
            return unquote(urlsplit(name).path)
        if is_url(name):
            return name
        return f"{self.place.rstrip('/')}/{quote(name) if self.place.startswith('http') else name}"

    def locations(self) -> Iterator[str]:
        """Of all indexes and shards."""
        for split in self.splits.values():
            yield self.locate(split.index)
            yield from (self.locate(shard.name) for shard in split.shards)

    @property
    def streamed(self) -> bool:
        """Whether any of it has to come over the network."""
        return any(is_url(location) for location in self.locations())

    def probes(self) -> tuple[str, ...]:
        """One location for each client that reads it (a folder of this machine, a bucket, a server)."""
        clients = {split_url(at)[0] if is_url(at) else str(Path(at).parent): at for at in self.locations()}
        return tuple(clients.values())

    def index(self, split: str) -> Index:
        """The records of a split, checked. Raises DataError."""
        part = self.splits[split]
        where = self.locate(part.index)
        return self.parsed(split, self.objects.whole(where))

    def parsed(self, split: str, data: bytes | memoryview) -> Index:
        """The records of a split from the bytes of its index. Raises DataError where they are not those."""
        part = self.splits[split]
        records = parse_index(data, part.index_sha256, self.locate(part.index))
        if len(records) != part.samples:
            raise DataError(f"index {self.locate(part.index)} has {len(records)} records for {part.samples} samples")
        if fault := index_fault(records, part.counts, [shard.bytes for shard in part.shards], len(self.classes)):
            raise DataError(f"index {self.locate(part.index)} {fault}; {AGAIN}")
        return records


def open_dataset(place: str | Path, endpoint: str = "") -> Dataset:
    """Reads and checks dataset.json. Raises DataError, one sentence for each thing that may be wrong."""
    place, objects = str(place), Objects(endpoint)
    path = f"{place.rstrip('/')}/{MANIFEST}"
    if not is_url(place) and not Path(path).is_file():
        raise DataError(f"{place} {_lack(Path(place))}")
    try:
        document = json.loads(_manifest(place, path, objects))
        version = document["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a dataset's manifest: {type(error).__name__}; pack the dataset again"
        ) from error
    if version != FORMAT:
        raise DataError(f"{path} has format version {version}; this Skiplane reads {FORMAT}: pack the dataset again")
    return _parse(place, document, objects)


def manifest(classes: tuple[str, ...], splits: Mapping[str, Split], made: Mapping[str, Any]) -> dict[str, Any]:
    """The document that `open_dataset` reads."""
    parts = {name: asdict(split) for name, split in splits.items()}
    return {"format": FORMAT, "classes": list(classes), "splits": parts, "made": dict(made)}


def verify(
    dataset: Dataset, how: Literal["size", "sha256"], progress: Callable[[str, int], None] | None = None
) -> None:
    """Checks every index and every shard's size, or its hash. `progress(shard, bytes)` hears of each shard.

    On a server the sizes of many are asked for at once, and of an index only that. Raises DataError.
    """
    for name, split in dataset.splits.items():
        if how == "sha256" or not is_url(dataset.locate(split.index)):
            dataset.index(name)
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    sizes = {dataset.locate(split.index): split.samples * RECORD.itemsize for split in dataset.splits.values()}
    sizes |= {dataset.locate(shard.name): shard.bytes for shard in shards}
    with ThreadPoolExecutor(ASKED_AT_ONCE if dataset.streamed else 1) as pool:
        for where, found in zip(sizes, pool.map(dataset.objects.size, sizes), strict=True):
            if found != sizes[where]:
                raise DataError(f"{_what(where)} has {found:,} bytes, dataset.json says {sizes[where]:,}; {AGAIN}")
    for shard in shards:
        where = dataset.locate(shard.name)
        if how == "sha256" and dataset.objects.sha256(where, shard.bytes) != shard.sha256:
            raise DataError(f"shard {where} does not match its checksum in dataset.json; {AGAIN}")
        if progress:
            progress(shard.name, shard.bytes)


def _what(where: str) -> str:
    return f"{'index' if where.endswith('.index') else 'shard'} {where}"


def _lack(root: Path) -> str:
    if (root / UNFINISHED).is_dir():
        return CUT_SHORT
    found = "is no folder" if root.exists() else "does not exist"
    if root.is_dir():
        found = f"has no {MANIFEST}" if any(root.iterdir()) else "is empty"
    return f"{found}; pack a dataset there first (python -m jobs.pack --help)"


def _manifest(place: str, path: str, objects: Objects) -> bytes:
    try:
        return objects.read(path)
    except DataError as error:
        if isinstance(error.__cause__, NotThere) and _unfinished(place, objects):
            raise DataError(f"{place} {CUT_SHORT}") from error
        raise


def _unfinished(place: str, objects: Objects) -> bool:
    """Whether a bucket holds what jobs.pack leaves there until it is done."""
    try:
        return objects.size(f"{place.rstrip('/')}/{UNFINISHED}/plan.json") > 0
    except DataError:
        return False


def file_sha256(path: Path) -> str:
    """sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(place: str, document: Mapping[str, Any], objects: Objects) -> Dataset:
    path = f"{place}/{MANIFEST}"
    try:
        classes = tuple(str(c) for c in document["classes"])
        splits = {name: _split(place, part) for name, part in document["splits"].items()}
        made = document["made"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} lacks {error}; pack the dataset again") from error
    if missing := {"train", "val"} - set(splits):
        raise DataError(f"{path} has no split '{min(missing)}'; train and val are needed")
    return Dataset(place, classes, splits, made, digest_of(classes, splits, made), objects)


def _split(place: str, part: Mapping[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in part["shards"])
    for shard in shards:
        if not _is_sound(shard):
            raise DataError(f"{MANIFEST} describes a shard as {str(shard)[:300]}; pack the dataset again")
        if not _allowed(shard.name, place):
            raise DataError(
                f"{MANIFEST} names the shard '{shard.name}'; only names inside the dataset's folder are allowed, and "
                f"URLs (file:// where {MANIFEST} itself is a local file)"
            )
    if not _plain(part["index"]):
        raise DataError(f"{MANIFEST} names the index '{part['index']}'; only names inside its folder are allowed")
    return Split(part["name"], shards, part["index"], part["index_sha256"])


def _is_sound(shard: Shard) -> bool:
    """Types and bounds: the manifest may come from anywhere."""
    counts = type(shard.samples) is int and type(shard.bytes) is int and 0 < shard.samples <= shard.bytes < 2**60
    texts = isinstance(shard.name, str) and isinstance(shard.sha256, str)
    return counts and texts and shard.name.isprintable() and bool(re.fullmatch(r"[0-9a-f]{64}", shard.sha256))


def _allowed(name: str, place: str) -> bool:
    if name.startswith("file:///"):
        return not is_url(place)  # what comes from a server does not choose files of this machine
    if not is_url(name):
        return _plain(name) and (place.startswith("http") or not is_url(place) or not set("?#") & set(name))
    try:
        return bool(split_url(name)[1])
    except ValueError:
        return False


def _plain(name: str) -> bool:
    return PurePosixPath(name).name == name and name not in ("", "..")


def digest_of(classes: tuple[str, ...], splits: Mapping[str, Split], made: Mapping[str, Any]) -> str:
    """sha256 of what a dataset holds (classes, shards, indexes, how images were resized), not of where it lies."""
    parts = {name: asdict(splits[name]) for name in sorted(splits)}
    for part in parts.values():
        for shard in part["shards"]:
            shard["name"] = PurePosixPath(shard["name"]).name
    content = {"classes": classes, "splits": parts} | ({"resize": made["resize"]} if "resize" in made else {})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
