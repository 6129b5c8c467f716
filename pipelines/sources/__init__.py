"""Where images come from when packing: each source gives classes and, for each split, images with labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """One image before it is packed; `load` gives its encoded bytes."""

    name: str  # where it came from, for messages and for its key
    label: int
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """Everything that is to be packed."""

    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Item]]
    made: Mapping[str, Any]  # how, for dataset.json
