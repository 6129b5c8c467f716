"""JPEGs that tests make themselves, and ways to break them."""

import io

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 60, width: int = 80, mode: str = "RGB") -> Image.Image:
    """A smooth random picture with some noise: neither flat nor white noise, as photographs are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def jpeg(seed: int, height: int = 60, width: int = 80, **options) -> bytes:
    return encode(picture(seed, height, width), **options)


def evaluated(data: bytes, resize: int, size: int) -> np.ndarray:
    """Pillow's and torchvision's evaluation: short side to `resize`, centre crop; int16 [size, size, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short, long = sorted((width, height))
    scaled = int(resize * long / short)
    width, height = (resize, scaled) if width <= height else (scaled, resize)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.int16)


def garbled(data: bytes) -> bytes:
    """Other bytes in the middle of the scan: still decodes, to another picture; only a checksum finds it."""
    middle = len(data) * 2 // 3
    return data[:middle] + bytes(b ^ 0x15 for b in data[middle : middle + 40]) + data[middle + 40 :]


def rotated(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(seed), exif=exif)


# What real collections hold: kind -> (how it is made from a seed, whether the trainer's decoder reads it).
KINDS = {
    "empty": (lambda seed: b"", False),
    "truncated": (lambda seed: jpeg(seed)[: 300 + seed * 17 % 1500], False),
    "garbled": (lambda seed: garbled(jpeg(seed)), True),
    "gif": (lambda seed: encode(picture(seed), "GIF"), False),
    "text": (lambda seed: b"<html>404 not found</html>" * (1 + seed % 20), False),
    "png": (lambda seed: encode(picture(seed), "PNG"), True),
    "cmyk": (lambda seed: encode(picture(seed, mode="CMYK")), True),
    "grey": (lambda seed: encode(picture(seed, mode="L")), True),
    "rotated": (rotated, True),
    "16-bit": (lambda seed: encode(picture(seed, mode="L").convert("I;16"), "PNG"), True),
    "progressive": (lambda seed: jpeg(seed, progressive=True), True),
    "1x1": (lambda seed: jpeg(seed, 1, 1), True),
}

BROKEN = {  # what may lie in a shard in place of a JPEG; each is refused by the decoder
    "empty": lambda data: b"",
    "one byte": lambda data: b"x",
    "text": lambda data: b"<html>404 not found</html>" * 20,
    "zeros": lambda data: bytes(len(data)),
    "header only": lambda data: data[:300],
    "cut short": lambda data: data[: len(data) * 2 // 3],
    "two bytes short": lambda data: data[:-2],
    "a gif": lambda data: encode(picture(1), "GIF"),
}
