"""Storing smaller images: the short side scaled to so many px, as a JPEG, from the pixels that training would see."""

import io
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from pipelines.checking import Checked

LONGEST_JPEG = 65500  # px; Pillow writes no longer side


@dataclass(frozen=True)
class Resize:
    """short_side: px; images that are no larger stay as they are, byte for byte. quality: of the JPEGs, 1 .. 100."""

    short_side: int
    quality: int = 90

    @property
    def made(self) -> dict[str, int]:
        """For dataset.json; part of the dataset's digest."""
        return asdict(self)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as torchvision's Resize gives them.

        >>> Resize(400).size(500, 375), Resize(400).size(500, 800)
        ((500, 375), (400, 640))
        """
        short, long = min(height, width), max(height, width)
        if short <= self.short_side:
            return height, width
        scaled = min(int(self.short_side * long / short), LONGEST_JPEG)
        return (self.short_side, scaled) if height <= width else (scaled, self.short_side)

    def __call__(self, image: "Checked") -> "Checked":
        """image: with its pixels."""
        height, width = self.size(image.height, image.width)
        if image.fault or (height, width) == (image.height, image.width):
            return replace(image, pixels=None)
        assert image.pixels is not None
        buffer = io.BytesIO()
        smaller = Image.fromarray(image.pixels).resize((width, height), Image.Resampling.LANCZOS)
        smaller.save(buffer, "JPEG", quality=self.quality)
        return replace(image, data=buffer.getvalue(), format="JPEG", height=height, width=width, pixels=None)
