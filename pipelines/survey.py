"""What is in a dataset, for people: counts, bytes, histograms as text, and a sheet of samples as a picture."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageOps

from pipelines.dataset import Dataset
from pipelines.errors import ConfigError
from pipelines.index import BLOCK, Index
from pipelines.pack import MEASURED, left_out_of
from pipelines.packing.labels import describe_order

COLUMNS, ROWS = 8, 8  # samples on a sheet
TILE, CAPTION = 128, 16  # px
AT_ONCE = 16  # images read, of a server
WIDEST = 40  # characters of a bar


def describe(dataset: Dataset) -> str:
    """Text of a few dozen lines. Raises DataError where an index is damaged."""
    made = ", ".join(f"{key} {_plain(value)}" for key, value in dataset.made.items() if key not in MEASURED)
    lines = [
        f"dataset     {dataset.place}",
        f"digest      {dataset.digest}",
        f"made        {made}",
        f"left out    {len(left_out_of(dataset))} images that could not be used",
        f"classes     {len(dataset.classes)}: {_few(dataset.classes)}",
    ]
    if (chi2 := dataset.made.get("order_chi2")) is not None:
        lines.append(f"order       {describe_order(chi2, len(dataset.classes), len(dataset.splits['train'].shards))}")
    indices = {name: dataset.index(name) for name in dataset.splits}
    lines += [_split_line(dataset, name, index) for name, index in indices.items()]
    index = np.concatenate(list(indices.values()))
    lines += ["", "short side, px", *histogram(np.minimum(index["height"], index["width"]))]
    lines += ["", "encoded image, bytes", *histogram(index["size"])]
    return "\n".join(lines)


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _few(classes: tuple[str, ...]) -> str:
    return ", ".join(classes if len(classes) <= 10 else (*classes[:5], "...", *classes[-2:]))


def _split_line(dataset: Dataset, name: str, index: Index) -> str:
    shards = dataset.splits[name].shards
    each = np.bincount(index["label"], minlength=len(dataset.classes))
    counts = f"{len(index):,} images in {len(shards):,} shards, {sum(shard.bytes for shard in shards) / 1e6:,.1f} MB"
    return f"{name:<11} {counts}; {each.min():,} to {each.max():,} images a class"


def histogram(values: ArrayLike) -> list[str]:
    """One line a bin with its bounds, count and a bar; bins grow by halves: 32, 48, 64, 96, 128 ..."""
    counts = np.asarray(values, np.int64)
    top = int(counts.max()).bit_length()
    edges = np.unique([edge for power in range(top + 1) for edge in (1 << power, 3 << power >> 1)])
    found, _ = np.histogram(counts, [*edges, edges[-1] * 2])
    shown = range(np.flatnonzero(found)[0], np.flatnonzero(found)[-1] + 1)
    ends = [*edges[1:], edges[-1] * 2]
    return [
        f"{edges[i]:>10,} to {ends[i] - 1:<10,} {found[i]:>11,}  {'#' * -(-int(found[i]) * WIDEST // found.max())}"
        for i in shown
    ]


def sheet(dataset: Dataset, path: Path) -> None:
    """Draws up to 64 training images, spread evenly over the classes, as a PNG. Raises ConfigError for its path."""
    labels = dataset.index("train")["label"]
    ids = spread(labels, COLUMNS * ROWS)
    page = Image.new("RGB", (COLUMNS * TILE, -(-len(ids) // COLUMNS) * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(page)
    for i, tile in enumerate(_tiles(dataset, ids)):
        x, y = i % COLUMNS * TILE, i // COLUMNS * (TILE + CAPTION)
        page.paste(tile, (x, y))
        name = dataset.classes[labels[ids[i]]].encode("ascii", "replace").decode()
        draw.text((x + 2, y + TILE + 2), name[:20], "black")
    try:
        page.save(path, "PNG")
    except OSError as error:
        raise ConfigError(f"--sheet {path} cannot be written: {error.strerror}; name another file") from error


def spread(labels: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """At most `count` sample ids, evenly spaced in the order of labels."""
    order = labels.argsort(kind="stable")
    rows = np.linspace(0, len(labels) - 1, min(count, len(labels))).astype(np.int64)
    return order[rows]


def _tiles(dataset: Dataset, ids: NDArray[np.int64]) -> Iterator[Image.Image]:
    """The images at one size; grey where one cannot be shown."""
    shards = dataset.splits["train"].shards

    def read(record: Index) -> bytes:
        begin = int(record["block"]) * BLOCK
        return dataset.objects.part(dataset.locate(shards[record["shard"]].name), begin, begin + int(record["size"]))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for data in pool.map(read, dataset.index("train")[ids]):
            try:
                with Image.open(io.BytesIO(data)) as image:
                    yield ImageOps.pad(image.convert("RGB"), (TILE - 4, TILE - 4), color="white")
            except Exception:  # damaged since it was packed: `verify` is what says so
                yield Image.new("RGB", (TILE - 4, TILE - 4), "grey")
