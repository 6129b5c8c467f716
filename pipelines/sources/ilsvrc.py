"""The official ImageNet tars (ILSVRC2012, classification), read where they lie: nothing is unpacked.

The training tar holds a tar of each class, named by its WNID. The validation tar is flat; line i of the devkit's ground
truth is the ILSVRC2012_ID of its i-th image, and meta.mat says which WNID that is. Classes are numbered by sorted WNID,
as torchvision numbers them: ILSVRC2012_ID is another order.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import ConfigError, DataError
from pipelines.sources import BadImage, Item, Progress, Source
from pipelines.sources.tarfiles import members as tar_members

OFFICIAL = {"training images": 1_281_167, "validation images": 50_000, "classes": 1000}
MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


def ilsvrc(
    train: Path,
    val: Path,
    devkit: Path,
    expect: Literal["official", "any"] = "official",
    progress: Progress = lambda *_: None,
) -> Source:
    """Lists the tars' members by their headers; images are read when they are packed.

    Raises ConfigError for a file that does not exist, DataError for one that is not what it should be or is cut short,
    and, unless `expect` is "any", for counts other than the official ones.
    """
    for flag, path in (("--train", train), ("--val", val), ("--devkit", devkit)):
        if not path.is_file():
            raise ConfigError(f"{flag} is {path}, which is not a file; name the official tar")
    train, val = train.absolute(), val.absolute()  # items may be loaded elsewhere
    wnids, truth = read_devkit(devkit)
    classes, train_images = _train(train, set(wnids.values()), progress)
    val_images = _val(val, [wnids.get(number, "") for number in truth], classes)
    splits = {"train": train_images, "val": val_images}
    if expect == "official":
        counts = (len(train_images), len(val_images), len(classes))
        _check_counts(dict(zip(OFFICIAL, counts, strict=True)))
    listing = hashlib.sha256(b"".join(images.listing for images in splits.values())).hexdigest()
    return Source(classes, splits, {"source": "ilsvrc", "listing_sha256": listing}, (train, val))


@dataclass(frozen=True)
class TarImages:
    """Images in an uncompressed tar, by their places: 60 bytes an image. Items are made when asked for."""

    path: Path
    members: NDArray[np.void]  # [n] MEMBER
    names: NDArray[np.bytes_]  # [n]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int, /) -> Item:
        offset, size, label = self.members[index].tolist()
        return Item(self.names[index].decode(), label, partial(_pread, self.path, offset, size))

    @property
    def listing(self) -> bytes:
        """All that is known of the images, for a hash."""
        return self.members.tobytes() + b"\n".join(self.names.tolist())


def read_devkit(path: Path) -> tuple[Mapping[int, str], Sequence[int]]:
    """({ILSVRC2012_ID: WNID} of the classes, the ILSVRC2012_ID of each validation image). Raises DataError."""
    from scipy.io import loadmat  # takes a moment to import

    try:
        with tarfile.open(path) as tar:
            found = {PurePosixPath(m.name).name: m for m in tar if PurePosixPath(m.name).name in (META, TRUTH)}
            meta, truth = (_whole(tar.extractfile(found[name])) for name in (META, TRUTH))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]  # the others are groups of classes
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
        return wnids, [int(line) for line in truth.split()]
    except Exception as error:  # tarfile, zlib and loadmat raise many kinds; each means the same
        raise DataError(f"--devkit {path} is not ILSVRC2012_devkit_t12.tar.gz, or damaged ({error!r})") from error


def _whole(file: IO[bytes] | None) -> bytes:
    return file.read() if file else b""


def _train(path: Path, wnids: set[str], progress: Progress) -> tuple[tuple[str, ...], TarImages]:
    """Classes in sorted order, and all images, class by class as the tar has them."""
    found = {}
    total = path.stat().st_size
    with path.open("rb") as file:
        for name, begin, size in _members(file, 0, total, f"--train {path}"):
            wnid = name.removesuffix(".tar")
            if not re.fullmatch(r"n\d{8}\.tar", name) or wnid not in wnids or wnid in found:
                raise DataError(f"--train {path} holds '{name}'; only a tar of each class in the devkit is expected")
            found[wnid] = _table(list(_members(file, begin, begin + size, f"{name} in --train {path}")))
            progress("reading headers", begin + size, total)
    classes = tuple(sorted(found))
    if not all(len(found[wnid][0]) for wnid in classes) or not classes:
        raise DataError(f"--train {path} has a class without images, or no class at all; fetch the tar again")
    for label, wnid in enumerate(classes):
        found[wnid][0]["label"] = label
    members, names = zip(*found.values(), strict=True)
    return classes, TarImages(path, np.concatenate(members), np.concatenate(names))


def _val(path: Path, wnids: Sequence[str], classes: tuple[str, ...]) -> TarImages:
    with path.open("rb") as file:
        members, names = _table(sorted(_members(file, 0, path.stat().st_size, f"--val {path}")))
    if len(members) != len(wnids):
        raise DataError(f"--val {path} has {len(members):,} images, --devkit knows {len(wnids):,}; they do not match")
    if odd := sorted(set(wnids) - set(classes)):
        raise DataError(f"--val {path} has images of class '{odd[0]}', which --train lacks")
    label = {wnid: i for i, wnid in enumerate(classes)}
    members["label"] = [label[wnid] for wnid in wnids]
    return TarImages(path, members, names)


def _members(file: IO[bytes], begin: int, end: int, what: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset in `file`, bytes) of each file of the tar at begin..end. Raises DataError where it is cut short."""
    for member in tar_members(file, begin, end, what):
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield PurePosixPath(member.name).name, member.offset_data, member.size


def _table(members: Sequence[tuple[str, int, int]]) -> tuple[NDArray[np.void], NDArray[np.bytes_]]:
    """What TarImages holds, labels still 0: a seventh of the memory of the tuples."""
    table = np.zeros(len(members), MEMBER)
    table["offset"], table["size"] = [m[1] for m in members], [m[2] for m in members]
    return table, np.array([name.encode("utf-8", "backslashreplace") for name, _, _ in members], np.bytes_)


def _check_counts(found: Mapping[str, int]) -> None:
    for what, official in OFFICIAL.items():
        if found[what] != official:
            raise DataError(
                f"{found[what]:,} {what} were found, the official set has {official:,}; fetch the tars again, or say "
                "--expect any for another set"
            )


def _pread(path: Path, offset: int, size: int) -> bytes:
    """Opens the tar for each image: nothing to close, for some microseconds beside the milliseconds of decoding."""
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise BadImage(f"{path} ends before it")
    return data
