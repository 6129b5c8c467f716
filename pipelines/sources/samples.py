"""Samples of a foreign WebDataset tar, by WebDataset's rule: what shares a name up to the first dot is one sample.

The extensions say which member is the image and which the label; they may come in any order. Nothing is unpacked.
"""

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

from pipelines.sources import BadImage
from pipelines.sources.tarfiles import members

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm")
LABELS = ("cls", "index", "label", "txt", "json")
NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]*)")  # webdataset.tariterators.base_plus_ext
META = re.compile(r"__[^/]*__($|/)")  # left out by webdataset
LARGEST_LABEL = 1 << 20  # bytes
ODD = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link"}


@dataclass(frozen=True)
class Member:
    """Bytes in a tar; `fault` says why they cannot be taken as they lie."""

    offset: int
    size: int
    fault: str = ""

    def read(self, file: BinaryIO) -> bytes:
        """Raises BadImage where it has none of its own."""
        if self.fault:
            raise BadImage(self.fault)
        file.seek(self.offset)
        return file.read(self.size)


@dataclass
class Sample:
    """The members of one key, by extension."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    def first(self, extensions: Sequence[str], what: str) -> tuple[str, Member]:
        """The first of the extensions that it has. Raises BadImage."""
        for extension in extensions:
            if extension in self.members:
                return extension, self.members[extension]
        raise BadImage(
            f"it has no {what}: there is {', '.join(sorted(self.members))}, and none of {', '.join(extensions)}"
        )


@dataclass(frozen=True)
class Rule:
    """Which members are images and labels: extensions, the first that a sample has. A label may be json:FIELD.

    classes: names, in the order of their numbers; where empty, any label is one.
    """

    images: tuple[str, ...] = IMAGES
    labels: tuple[str, ...] = LABELS
    classes: tuple[str, ...] = ()

    def image(self, sample: Sample) -> Member:
        """Raises BadImage where there is none, or more than one of a name."""
        return sample.first(self.images, "image")[1]

    def label(self, sample: Sample, file: BinaryIO) -> str:
        """A whole number in digits, or a name. Raises BadImage."""
        fields = {spec.partition(":")[0]: spec.partition(":")[2] or "label" for spec in self.labels}
        extension, member = sample.first(tuple(fields), "label")
        if not 0 < member.size <= LARGEST_LABEL and not member.fault:
            raise BadImage(f"its {extension} has {member.size:,} bytes, which is no label")
        try:
            text = member.read(file).decode().strip()
            label = _of_json(text, fields[extension]) if extension == "json" else text
        except ValueError as error:
            raise BadImage(f"its {extension} is no label: {error}") from error
        if not label:
            raise BadImage(f"its {extension} is empty")
        return self._known(str(int(label)) if is_number(label) else label)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.classes)

    def _known(self, label: str) -> str:
        if self.classes and label not in self._names and not (is_number(label) and int(label) < len(self.classes)):
            raise BadImage(f"its label '{label[:40]}' is none of the {len(self.classes):,} classes of --classes")
        return label


def is_number(label: str) -> bool:
    """Whether a label is a whole number; numbers below zero are names."""
    return label.isascii() and label.isdigit()


def read_samples(file: BinaryIO, size: int, what: str) -> list[Sample]:
    """All samples of a tar of `size` bytes. Hidden files and folders are none. Raises DataError (see members)."""
    samples: dict[str, Sample] = {}
    for info in members(file, 0, size, what, alone=True):
        name = re.sub(r"^(\./)+", "", info.name)
        found = NAME.fullmatch(name)
        if info.isdir() or not found or META.match(name):
            continue
        sample = samples.setdefault(found["key"], Sample(found["key"]))
        extension = found["extension"].lower()
        member = Member(info.offset_data, info.size, _fault(info, extension))
        if extension in sample.members:
            member = Member(0, 0, f"its {extension} is there twice")
        sample.members[extension] = member
    return list(samples.values())


def _fault(info: tarfile.TarInfo, extension: str) -> str:
    if info.issparse():
        return f"its {extension} is stored sparse"
    return "" if info.isreg() else f"its {extension} is {ODD.get(info.type, 'no plain file')}"


def _of_json(text: str, field: str) -> str:
    document = json.loads(text)
    label = document.get(field) if isinstance(document, dict) else None
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"field '{field}' is " + ("not there" if label is None else f"{label!r}"))
    return str(label)
