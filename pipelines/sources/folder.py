"""Class folders, as torchvision's ImageFolder reads them: DIR/class/**/image, classes in sorted order."""

import hashlib
from collections.abc import Iterator, Set
from pathlib import Path

from pipelines.errors import ConfigError, DataError
from pipelines.sources import Item, Source

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's list


def folder(train: Path, val: Path) -> Source:
    """Raises ConfigError for a folder that does not exist, DataError for a class without images or unlike classes."""
    train, val = train.absolute(), val.absolute()
    classes = _classes("--train", train)
    check_same_classes(set(classes), set(_classes("--val", val)))
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    digest = hashlib.sha256()
    for split, place in (("train", train), ("val", val)):
        for label, path in _images(place, classes):
            name = path.relative_to(place).as_posix()
            splits[split].append(Item(name, label, path.read_bytes))
            digest.update(f"{split} {name} {_bytes(path)}\n".encode("utf-8", "surrogateescape"))
    # Of names and sizes: tells whether the folders are as they were when packed, without reading the images.
    return Source(classes, splits, {"source": "folder", "files_sha256": digest.hexdigest()}, (train, val))


def check_same_classes(train: Set[str], val: Set[str]) -> None:
    """Raises DataError that names a class which only one split has."""
    if odd := set(train) ^ set(val):
        where = "--train" if min(odd) in train else "--val"
        raise DataError(f"class folder '{min(odd)}' is only in {where}; both splits need the same classes")


def _classes(flag: str, place: Path) -> tuple[str, ...]:
    if not place.is_dir():
        raise ConfigError(f"{flag} is {place}, which is not a folder; name a folder of class folders")
    classes = tuple(sorted(p.name for p in place.iterdir() if p.is_dir()))
    if not classes:
        raise DataError(f"{flag} {place} has no class folders; each class needs a folder with its images")
    return classes


def _images(place: Path, classes: tuple[str, ...]) -> Iterator[tuple[int, Path]]:
    """(label, path) of each image."""
    for label, name in enumerate(classes):
        paths = sorted(p for p in (place / name).rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not paths:
            raise DataError(f"class folder {place / name} has no images; remove it or fill it")
        for path in paths:
            yield label, path


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; remove or repair it") from error
