"""scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels) as JPEGs: real images, packed in seconds."""

import io
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from pipelines.sources import Item, Source

TRAIN, QUALITY = 1437, 95


def digits(size: int = 16, seed: int = 0) -> Source:
    """1,437 training and 360 validation images, drawn by class with `seed`, enlarged bilinearly to `size` px RGB."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    rows = np.arange(len(found.target))
    train, val = train_test_split(rows, train_size=TRAIN, random_state=seed, stratify=found.target)

    def item(row: int) -> Item:
        return Item(f"digit-{row:04d}", int(found.target[row]), partial(_jpeg, found.images[row], size))

    splits = {"train": [item(int(r)) for r in sorted(train)], "val": [item(int(r)) for r in sorted(val)]}
    return Source(tuple(str(name) for name in found.target_names), splits, made(size, seed))


def made(size: int = 16, seed: int = 0) -> dict[str, Any]:
    """What dataset.json says of how it was made; known without scikit-learn, whose import takes seconds."""
    return {"source": "digits", "size": size, "quality": QUALITY, "seed": seed}


def _jpeg(image: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", size: int) -> bytes:
    """Levels 0..16 -> JPEG bytes."""
    grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8), mode="L")
    buffer = io.BytesIO()
    grey.convert("RGB").resize((size, size), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
