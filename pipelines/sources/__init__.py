"""Where images come from when packing: each source gives classes and, for each split, images with labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Progress = Callable[[str, int, int], None]  # what is counted (images of a split, bytes of a tar), done, in all


class BadImage(Exception):
    """One image's bytes are damaged where they lie, though the source as a whole can be read; says why."""


@dataclass(frozen=True)
class Item:
    """One image before it is packed; `load` gives its encoded bytes, or raises BadImage or OSError."""

    name: str  # where it came from, for messages and for its key
    label: int
    load: Callable[[], bytes]


class Items(Protocol):
    """A list of items, or what looks like one and makes them when asked: ImageNet has 1.28 million."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True)
class Source:
    """Everything that is to be packed."""

    classes: tuple[str, ...]
    splits: Mapping[str, Items]
    made: Mapping[str, Any]  # how, for dataset.json
    paths: tuple[Path, ...] = ()  # what has to be there where items are loaded
