"""The figures of benchmarks.gpu: which there are, and how they are shown."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.dali import Where

UNMEASURED = "not measured yet"
LOADS = (0.0, 0.65, 1.0)  # shares of a batch for a GPU's JPEG engine; 0.65 is DALI's default and the product's
Row = dict[str, Any]
Pixels = NDArray[np.uint8]

TITLES = {"gpu": "on a GPU", "cpu": "on this CPU (shows that it runs, no more)"}

# Every row of the table, in its order.
CEILING = "train: synthetic batches, the ceiling"
TRAIN: dict[Where, str] = {"gpu": "train: JPEGs decoded on the GPU", "cpu": "train: JPEGs decoded on the CPU"}
ALONE: dict[Where, str] = {"gpu": "decode alone, on the GPU", "cpu": "decode alone, on the CPU"}
TORCH, DEVICE = "memory: torch's peak in training", "memory: whole device, DALI's pools included"
ENGINE = {load: f"pixels, JPEG engine's share {load:.0%}: to the CPU's" for load in LOADS}
SHARE, PLACE = "pixels: change with the engine's share", "pixels: change with the place in the batch"
ROWS = (CEILING, *TRAIN.values(), *ALONE.values(), TORCH, DEVICE, *ENGINE.values(), SHARE, PLACE)


def difference(a: Pixels, b: Pixels) -> Row:
    """How far two decodings of the same images, uint8 [n, S, S, 3], are from each other, in levels of 255."""
    apart = np.abs(a.astype(np.int16) - b)
    return {"max": int(apart.max()), "mean": float(apart.mean()), "images": float(apart.any((1, 2, 3)).mean())}


def columns(rows: dict[str, Row], on_gpu: bool) -> dict[str, dict[str, Row | str]]:
    """{"gpu": every row}, and "cpu" beside it where that is what ran: its figures never stand for a GPU's."""
    gpu = {name: rows[name] if on_gpu else UNMEASURED for name in ROWS}
    return {"gpu": gpu} if on_gpu else {"gpu": gpu, "cpu": dict(rows)}


def table(columns: Mapping[str, Mapping[str, Row | str]]) -> str:
    """For people: a line a figure, a column a kind of device; plain text, so that nothing else is needed for it."""
    lines = [["", *(TITLES[kind] for kind in columns)]]
    lines += [[name, *(cell(column.get(name, "-")) for column in columns.values())] for name in ROWS]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cell(row: Row | str) -> str:
    """One figure in words."""
    if isinstance(row, str):
        return row
    if "gib" in row:
        return f"{row['gib']:.1f} GiB"
    if "max" in row:
        return f"max {row['max']}, mean {row['mean']:.3f}, {row['images']:.0%} of images" if row["max"] else "no"
    text = f"{row['images_per_s']:,.0f} img/s ({row['range'][0]:,.0f}-{row['range'][1]:,.0f})"
    return text + (f", {row['waiting_for_data']:.0%} waiting for data" if "waiting_for_data" in row else "")
