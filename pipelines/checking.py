"""Whether images can be trained on: each is decoded once, whole, by the decoder that will train on it.

Pillow accepts what DALI refuses (GIF, for one), so Pillow is only asked for sizes, and for the reason of a refusal.
"""

import io
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.augment import Geometry
from pipelines.dali import Decoder, Refused
from pipelines.errors import DataError
from pipelines.reader import EncodedBatch
from pipelines.sources import BadImage, Item

MOST, MOST_PIXELS = 32, 1 << 26  # images and pixels that are decoded at once: 200 MB
LONGEST = 65535  # px; a record keeps 16 bits a side
Pixels = NDArray[np.uint8]  # [height, width, 3] RGB


@dataclass(frozen=True)
class Checked:
    """An image's bytes, what they are, and why they cannot be trained on; `fault` is empty where they can."""

    item: Item
    data: bytes = b""
    format: str = ""
    height: int = 0  # as stored, px
    width: int = 0
    fault: str = ""
    pixels: Pixels | None = field(default=None, compare=False, repr=False)  # as in training; where they were asked for


def checked(items: Iterable[Item], threads: int, pixels: bool = False) -> Generator[Checked, None, None]:
    """Every item, in order, a few at a time; with their pixels if asked. Raises DataError for one that cannot be read.

    Closing it ends the decoder's threads.
    """
    with closing(Decoder(1, "cpu", None, threads, MOST)) as decoder:
        for group in _groups(map(_look, items)):
            for image in _decoded(decoder, group):
                yield image if pixels else replace(image, pixels=None)


def _look(item: Item) -> Checked:
    """Loads an item; its size from its header."""
    try:
        data = item.load()
    except BadImage as bad:
        return Checked(item, fault=str(bad))
    except OSError as error:
        raise DataError(f"{item.name} cannot be read: {error.strerror or error}; repair the source") from error
    if not data:
        return Checked(item, fault="it is empty")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            found = Checked(item, data, image.format or "?", image.height, image.width)
    except UnidentifiedImageError:
        return Checked(item, data, fault="it is not an image")
    except Exception as error:  # a damaged header raises many kinds; each means the same
        return Checked(item, data, fault=str(error))
    if max(found.height, found.width) > LONGEST:
        return replace(found, fault=f"it has {found.width} x {found.height} px; at most {LONGEST} a side are allowed")
    return found


def _groups(images: Iterable[Checked]) -> Iterator[list[Checked]]:
    group: list[Checked] = []
    pixels = 0
    for image in images:
        more = image.height * image.width
        if group and (len(group) == MOST or pixels + more > MOST_PIXELS):
            yield group
            group, pixels = [], 0
        group.append(image)
        pixels += more
    if group:
        yield group


def _decoded(decoder: Decoder, group: Sequence[Checked]) -> Iterator[Checked]:
    """All at once; where that is refused, each alone, because DALI does not say reliably which one was bad."""
    try:
        whole = iter(_pixels(decoder, [image for image in group if not image.fault]))
    except Refused:
        yield from (_alone(decoder, image) for image in group)
        return
    for image in group:
        yield image if image.fault else replace(image, pixels=next(whole))


def _alone(decoder: Decoder, image: Checked) -> Checked:
    if image.fault:
        return image
    try:
        return replace(image, pixels=_pixels(decoder, [image])[0])
    except Refused as refused:
        return replace(image, fault=_why(image, str(refused)))


def _pixels(decoder: Decoder, images: Sequence[Checked]) -> list[Pixels]:
    """[height, width, 3] of each. Raises Refused where one does not decode."""
    if not images:
        return []
    sizes = np.array([(image.height, image.width) for image in images], np.int32)
    none = np.zeros_like(sizes)
    whole = Geometry(np.concatenate([none, sizes], axis=1), sizes, none, none[:, 0].copy())
    return [window.numpy() for window in decoder.windows(_batch([image.data for image in images], sizes), whole)]


def _why(image: Checked, refusal: str) -> str:
    """Pillow's words where it refuses the image too; they say more than DALI's."""
    try:
        with Image.open(io.BytesIO(image.data)) as opened:
            opened.load()
    except Exception as error:
        return str(error)
    return f"the decoder refuses this {image.format} ({refusal})"


def _batch(images: Sequence[bytes], sizes: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> EncodedBatch:
    offsets = np.concatenate([[0], np.cumsum([len(image) for image in images])])
    none = np.zeros(len(images), np.int32)
    data = np.frombuffer(b"".join(images), np.uint8)
    return EncodedBatch(none.astype(np.int64), data, offsets, none, sizes, none.astype(np.uint32), none == 0)
