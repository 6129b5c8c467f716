"""Tensors as one run of bytes that is no pickle: the safetensors format, which other programs read too.

Eight bytes say how long the header is; the header is JSON, name -> dtype, shape and place; the tensors follow, row by
row, the widest elements first so that each stands where its type may. https://github.com/huggingface/safetensors
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

Buffer = bytes | bytearray | memoryview
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PREFIX, ALIGN = 8, 8  # bytes
META = "__metadata__"


@dataclass(frozen=True)
class Layout:
    """Where each of some named tensors stands in the bytes. `groups`: first parts of the names, kept where empty."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], groups: tuple[str, ...] = ()) -> "Layout":
        """Raises ValueError for a dtype that the format does not have."""
        names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # stable: else in their order
        if strange := [name for name in names if tensors[name].dtype not in CODES]:
            raise ValueError(f"{strange[0]} is {tensors[strange[0]].dtype}, which safetensors does not have")
        chosen = [tensors[name] for name in names]
        return cls(tuple(names), tuple(t.dtype for t in chosen), tuple(tuple(t.shape) for t in chosen), groups)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each tensor ends, counted from the first one's first byte."""
        end, ends = 0, []
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            end += prod(shape) * dtype.itemsize
            ends.append(end)
        return tuple(ends)

    @cached_property
    def head(self) -> bytes:
        """The length of the header, and the header."""
        entries: dict[str, Any] = {META: {"format": "pt", "groups": " ".join(self.groups)}}
        for name, dtype, shape, begin, end in zip(
            self.names, self.dtypes, self.shapes, (0, *self.ends), self.ends, strict=False
        ):
            entries[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGN)
        return len(text).to_bytes(PREFIX, "little") + text

    @property
    def nbytes(self) -> int:
        """Of the whole: header and tensors."""
        return len(self.head) + (self.ends[-1] if self.ends else 0)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in `memory`, uint8 [nbytes], each with its dtype and shape; nothing is copied."""
        memory, begins = memory[len(self.head) :], (0, *self.ends)
        return [
            memory[begin:end].view(dtype).view(shape)
            for begin, end, dtype, shape in zip(begins, self.ends, self.dtypes, self.shapes, strict=False)
        ]


def read(data: Buffer) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(tensors by name, groups) of a file's bytes, which the tensors share where they may be written to.

    Raises ValueError for what is no such file.
    """
    try:
        length = int.from_bytes(data[:PREFIX], "little")
        if PREFIX + length > len(data):
            raise ValueError(f"its header would end after {length:,} bytes")
        entries = json.loads(bytes(data[PREFIX : PREFIX + length]))
        groups = tuple(entries.pop(META, {}).get("groups", "").split())
        memory = memoryview(data)[PREFIX + length :]
        body = memory if not memory.readonly else memoryview(bytearray(memory))
        return {name: _tensor(body, **entry) for name, entry in entries.items()}, groups
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"no safetensors file: {error}") from error


def grouped(data: Buffer) -> dict[str, dict[str, Tensor]]:
    """The same of a file whose names begin with a group: group -> rest of the name -> tensor."""
    flat, groups = read(data)
    tensors: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for name, tensor in flat.items():
        group, _, rest = name.partition(".")
        if group not in tensors:
            raise ValueError(f"no group for {name}")
        tensors[group][rest] = tensor
    return tensors


def _tensor(body: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    begin, end = data_offsets
    kind, count = DTYPES[dtype], prod(shape)
    if not 0 <= begin <= end <= len(body) or end - begin != count * kind.itemsize:
        raise ValueError(f"bytes {begin} to {end} of {len(body)} cannot be {shape} of {dtype}")
    if not count:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(body, dtype=kind, count=count, offset=begin).view(shape)
