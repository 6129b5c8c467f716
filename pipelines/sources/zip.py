"""Class folders in a zip, PREFIX/class/**/image; read where they lie, nothing is unpacked."""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from pipelines.errors import ConfigError, DataError
from pipelines.sources import BadImage, Item, Source
from pipelines.sources.folder import EXTENSIONS, check_same_classes

USUAL = {"--train": ("train",), "--val": ("val", "valid", "validation", "test")}  # last part of a prefix
Images = Mapping[PurePosixPath, zipfile.ZipInfo]


def zipped(file: Path, train: str = "", val: str = "") -> Source:
    """train, val: folders of class folders inside; where empty, the only one that is named as usual.

    Raises ConfigError where there is no such folder, or several; DataError for a file that is not a whole zip.
    """
    archive = _open(file)
    images = {PurePosixPath(info.filename): info for info in archive.infolist() if _is_image(info)}
    prefixes = {"train": _prefix(images, file, "--train", train), "val": _prefix(images, file, "--val", val)}
    parts = {name: _below(images, prefix) for name, prefix in prefixes.items()}
    classes, other = ({path.parts[0] for path in part} for part in parts.values())
    check_same_classes(classes, other)
    label = {name: i for i, name in enumerate(sorted(classes))}
    splits = {
        name: [Item(str(path), label[path.parts[0]], partial(_read, archive, info)) for path, info in part.items()]
        for name, part in parts.items()
    }
    listing = hashlib.sha256("\n".join(f"{i.filename} {i.file_size} {i.CRC}" for i in images.values()).encode())
    made = {"source": "zip", **{name: str(prefix) for name, prefix in prefixes.items()}}
    return Source(tuple(label), splits, {**made, "listing_sha256": listing.hexdigest()})


def _open(file: Path) -> zipfile.ZipFile:
    if not file.is_file():
        raise ConfigError(f"FILE.zip is {file}, which is not a file")
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise DataError(f"{file} is not a zip, or cut short ({error}); fetch it again") from error


def _is_image(info: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(info.filename)
    return path.suffix.lower() in EXTENSIONS and not info.is_dir() and path.parts[0] != "__MACOSX"


def _prefix(images: Images, file: Path, flag: str, wanted: str) -> PurePosixPath:
    """The folder of class folders that is meant."""
    folders = {parent for path in images for parent in path.parent.parents}
    if wanted:
        if (prefix := PurePosixPath(wanted)) in folders:
            return prefix
        raise ConfigError(f"{flag} is '{wanted}', which is no folder of class folders in {file}; {_shown(folders)}")
    usual = [folder for folder in folders if folder.name in USUAL[flag]]
    if len(usual) == 1:
        return usual[0]
    raise ConfigError(
        f"{flag} is needed, as {file} has {len(usual)} folders of class folders named as usual; "
        f"{_shown(usual or folders)}"
    )


def _shown(folders: Sequence[PurePosixPath] | set[PurePosixPath]) -> str:
    names = sorted(map(str, folders))
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are {', '.join(names[:8])}{more}" if names else "there are none"


def _below(images: Images, prefix: PurePosixPath) -> Images:
    """Images by their paths below a prefix, in sorted order; what lies in no class folder is none of them."""
    inside = {path.relative_to(prefix): info for path, info in images.items() if path.is_relative_to(prefix)}
    return {path: inside[path] for path in sorted(inside) if len(path.parts) > 1}


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:  # its checksum among them
        raise BadImage(str(error)) from error
    except (RuntimeError, NotImplementedError) as error:  # a password, a method of compression
        raise DataError(f"{info.filename} in {archive.filename} cannot be read: {error}") from error
