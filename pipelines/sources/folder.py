"""Class folders, as torchvision's ImageFolder reads them: DIR/class/**/image, classes in sorted order."""

import hashlib
from collections.abc import Iterator, Set
from pathlib import Path

from pipelines.errors import ConfigError, DataError
from pipelines.sources import Item, Source

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's list


def folder(train: Path, val: Path) -> Source:
    """Raises ConfigError for a folder that does not exist, DataError for a class without images or unlike classes."""
    classes = _classes("--train", train)
    check_same_classes(set(classes), set(_classes("--val", val)))
    splits = {name: list(_items(place, classes)) for name, place in (("train", train), ("val", val))}
    names = "\n".join(item.name for items in splits.values() for item in items)
    return Source(classes, splits, {"source": "folder", "names_sha256": hashlib.sha256(names.encode()).hexdigest()})


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


def _items(place: Path, classes: tuple[str, ...]) -> Iterator[Item]:
    for label, name in enumerate(classes):
        paths = sorted(p for p in (place / name).rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not paths:
            raise DataError(f"class folder {place / name} has no images; remove it or fill it")
        for path in paths:
            yield Item(path.relative_to(place).as_posix(), label, path.read_bytes)
