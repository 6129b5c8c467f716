"""Class folders in a zip, PREFIX/class/**/image; read where they lie, nothing is unpacked."""

import bz2
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from pipelines.errors import ConfigError, DataError
from pipelines.sources import BadImage, Item, Source
from pipelines.sources.folder import EXTENSIONS, check_same_classes

USUAL = {"--train": ("train",), "--val": ("val", "valid", "validation", "test")}  # last part of a prefix
HEADER = 30  # bytes before an entry's name
ENCRYPTED = 1  # bit of an entry's flags
UNPACK: Mapping[int, Callable[[bytes], bytes]] = {
    zipfile.ZIP_STORED: bytes,
    zipfile.ZIP_DEFLATED: partial(zlib.decompress, wbits=-15),
    zipfile.ZIP_BZIP2: bz2.decompress,
}
Images = Mapping[PurePosixPath, zipfile.ZipInfo]


def zipped(file: Path, train: str = "", val: str = "") -> Source:
    """train, val: folders of class folders inside; where empty, the only one that is named as usual.

    Raises ConfigError where there is no such folder, or several; DataError for a file that is not a whole zip.
    """
    file = file.absolute()
    images = {PurePosixPath(info.filename): info for info in _listed(file) if _is_image(info)}
    prefixes = {"train": _prefix(images, file, "--train", train), "val": _prefix(images, file, "--val", val)}
    parts = {name: _below(images, prefix) for name, prefix in prefixes.items()}
    classes, other = ({path.parts[0] for path in part} for part in parts.values())
    check_same_classes(classes, other)
    label = {name: i for i, name in enumerate(sorted(classes))}
    splits = {
        name: [Item(str(path), label[path.parts[0]], _load(file, info)) for path, info in part.items()]
        for name, part in parts.items()
    }
    listing = hashlib.sha256("\n".join(f"{i.filename} {i.file_size} {i.CRC}" for i in images.values()).encode())
    made = {"source": "zip", **{name: str(prefix) for name, prefix in prefixes.items()}}
    return Source(tuple(label), splits, {**made, "listing_sha256": listing.hexdigest()}, (file,))


def _listed(file: Path) -> list[zipfile.ZipInfo]:
    if not file.is_file():
        raise ConfigError(f"FILE.zip is {file}, which is not a file")
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
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


def _load(file: Path, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    """Reads an image by its place: a process that packs need not read the zip's list, nor keep the zip open."""
    if info.flag_bits & ENCRYPTED or info.compress_type not in UNPACK:
        how = "encrypted" if info.flag_bits & ENCRYPTED else f"compressed by method {info.compress_type}"
        raise DataError(f"{info.filename} in {file} is {how}; pack the zip again, stored or deflated")
    return partial(_read, file, info.header_offset, info.compress_size, info.compress_type, info.CRC)


def _read(file: Path, begin: int, size: int, method: int, crc: int) -> bytes:
    with file.open("rb") as raw:
        raw.seek(begin)
        header = raw.read(HEADER)
        if len(header) < HEADER or not header.startswith(b"PK\3\4"):
            raise BadImage(f"{file} has no entry where its list says so")
        raw.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)  # its name, and more that is in the list too
        packed = raw.read(size)
    try:
        data = UNPACK[method](packed)
    except (zlib.error, OSError, EOFError, ValueError) as error:
        raise BadImage(f"it cannot be decompressed: {error}") from error
    if zlib.crc32(data) != crc:
        raise BadImage("it does not match the checksum in its zip")
    return data
