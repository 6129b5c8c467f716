"""How each image is cropped and flipped: a pure function of (seed, epoch, sample id, size).

Random numbers are Philox4x32-10 (Salmon et al., SC'11), keyed by seed and purpose, counted by epoch and sample id: no
generator, no state, the same for a sample wherever and with whomever it is decoded.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
CROP, FLIP, COLOUR = 1, 2, 3  # purposes
ATTEMPTS = 10  # torchvision's RandomResizedCrop tries this often before it falls back to a centre crop
# AlexNet's PCA of ImageNet's RGB in 0..1 (Krizhevsky et al. 2012, section 4.1; the values that circulate since).
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@dataclass(frozen=True)
class Augment:
    """How training images are cropped."""

    kind: Literal["none", "resized_crop", "short_side", "pad_crop"] = "resized_crop"
    size: int = 224  # side of the result, px
    resize: int = 256  # short side before the centre crop of "none", px
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    short_side: tuple[int, int] = (256, 480)
    pad: int = 4  # zeros on each side before the crop of "pad_crop", px
    flip: bool = True

    @property
    def reaches_outside(self) -> bool:
        """Whether crops may leave the image, which is zeros there; such images are not resized."""
        return self.kind == "pad_crop"

    def check(self, smallest: int) -> None:
        """Raises ConfigError where a split's smallest side, px, has no room for a crop."""
        if self.reaches_outside and smallest + 2 * self.pad < self.size:
            raise ConfigError(
                f"data.augment is pad_crop with data.size = {self.size} and data.pad = {self.pad}, but the smallest "
                f"training image has a side of {smallest} px; lower data.size or raise data.pad to "
                f"{-(-(self.size - smallest) // 2)}"
            )


@dataclass(frozen=True)
class Geometry:
    """Decode `window`, resize it to `resize`, take size x size at `crop`, mirror where `flip` is 1.

    A crop of "pad_crop" may begin above or left of the image, or end below or right of it.
    """

    window: Ints  # [n, 4]: y, x, height, width in the stored image, px
    resize: Ints  # [n, 2]: height, width
    crop: Ints  # [n, 2]: y, x in the resized window
    flip: Ints  # [n]: 0 or 1

    def take(self, rows: ArrayLike) -> "Geometry":
        """The rows of some samples."""
        index = np.asarray(rows)
        return Geometry(self.window[index], self.resize[index], self.crop[index], self.flip[index])


def train_geometry(augment: Augment, seed: int, epoch: int, ids: ArrayLike, sizes: ArrayLike) -> Geometry:
    """Geometry of training images. ids: int64 [n]; sizes: [n, 2], stored height and width in px."""
    ids, sizes = np.asarray(ids, np.int64), np.asarray(sizes, np.int64)
    flip = _flips(seed, epoch, ids) if augment.flip else np.zeros(len(ids), np.int32)
    if augment.kind == "none":
        plain = eval_geometry(augment.resize, augment.size, sizes)
        return Geometry(plain.window, plain.resize, plain.crop, flip)
    if augment.kind == "pad_crop":
        window = np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)
        return Geometry(window, sizes.astype(np.int32), pad_crop(augment, seed, epoch, ids, sizes), flip)
    draw = resized_crop if augment.kind == "resized_crop" else short_side_crop
    window = draw(augment, seed, epoch, ids, sizes)
    square = np.full((len(ids), 2), augment.size, np.int32)
    return Geometry(window, square, np.zeros((len(ids), 2), np.int32), flip)


def eval_geometry(resize: int, size: int, sizes: ArrayLike) -> Geometry:
    """torchvision's Resize(resize) and CenterCrop(size): long side truncated, offset rounded half to even."""
    sizes = np.asarray(sizes, np.int64)
    n, short = len(sizes), sizes.min(axis=1, keepdims=True)
    resized = resize * sizes // short
    crop = np.rint((resized - size) / 2.0)
    window = np.concatenate([np.zeros((n, 2), np.int64), sizes], axis=1)
    return Geometry(window.astype(np.int32), resized.astype(np.int32), crop.astype(np.int32), np.zeros(n, np.int32))


def resized_crop(augment: Augment, seed: int, epoch: int, ids: NDArray[np.int64], sizes: NDArray[np.int64]) -> Ints:
    """torchvision's RandomResizedCrop: ten tries at a random area and log-uniform ratio, else a centre crop.

    Returns windows int32 [n, 4]: y, x, height, width.
    """
    u = uniform(seed, CROP, epoch, ids, 4 * ATTEMPTS).reshape(len(ids), ATTEMPTS, 4)
    full = sizes[:, None, :].astype(np.float64)  # [n, 1, 2]
    area = full[..., 0] * full[..., 1] * _between(u[..., 0], *augment.scale)
    ratio = np.exp(_between(u[..., 1], *np.log(augment.ratio)))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= full[..., 1]) & (height > 0) & (height <= full[..., 0])
    row, first = np.arange(len(ids)), fits.argmax(axis=1)
    h, w = height[row, first], width[row, first]
    y, x = np.floor(u[row, first, 2] * (sizes[:, 0] - h + 1)), np.floor(u[row, first, 3] * (sizes[:, 1] - w + 1))
    drawn = np.stack([y, x, h, w], axis=1).astype(np.int32)
    found = np.any(fits, axis=1, keepdims=True)
    return np.where(found, drawn, _centre(sizes, augment.ratio)).astype(np.int32)


def short_side_crop(augment: Augment, seed: int, epoch: int, ids: NDArray[np.int64], sizes: NDArray[np.int64]) -> Ints:
    """The paper's scale augmentation (section 3.4): short side uniform in a range, then a random square crop.

    Resizing first and cropping then is decoding a window of size * short / drawn px: int32 [n, 4].
    """
    u = uniform(seed, CROP, epoch, ids, 3)
    low, high = augment.short_side
    drawn = np.floor(_between(u[:, 0], low, high + 1))
    short = sizes.min(axis=1)
    side = np.clip(np.rint(augment.size * short / drawn), 1, short)
    y, x = np.floor(u[:, 1] * (sizes[:, 0] - side + 1)), np.floor(u[:, 2] * (sizes[:, 1] - side + 1))
    return np.stack([y, x, side, side], axis=1).astype(np.int32)


def pad_crop(augment: Augment, seed: int, epoch: int, ids: NDArray[np.int64], sizes: NDArray[np.int64]) -> Ints:
    """The paper's CIFAR augmentation (section 4.2): `pad` zeros on each side, then a random size x size crop.

    Returns where crops begin, int32 [n, 2]: y, x in the image before padding, -pad at the least.
    """
    places = sizes + 2 * augment.pad - augment.size + 1  # [n, 2]; `Augment.check` sees that there is one
    begin = np.floor(uniform(seed, CROP, epoch, ids, 2) * places) - augment.pad
    return begin.astype(np.int32)


def pca_shift(seed: int, epoch: int, ids: ArrayLike, std: float = 0.1) -> NDArray[np.float32]:
    """The paper's colour noise for each image, float32 [n, 3] RGB, to be added to pixels in 0..1."""
    u = uniform(seed, COLOUR, epoch, np.asarray(ids, np.int64), 4)
    radius, angle = np.sqrt(-2.0 * np.log1p(-u[:, :2])), 2 * np.pi * u[:, 2:]  # Box and Muller
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :3]
    return ((normal * std * EIGENVALUES) @ EIGENVECTORS.T).astype(np.float32)


def uniform(seed: int, purpose: int, epoch: int, ids: NDArray[np.int64], count: int) -> Floats:
    """`count` uniform numbers in [0, 1) for each sample, float64 [n, count], each with 32 random bits."""
    blocks = -(-count // 4)
    counter = np.empty((len(ids), blocks, 4), np.uint64)
    counter[..., 0], counter[..., 1] = (ids & 0xFFFFFFFF)[:, None], (ids >> 32)[:, None]
    counter[..., 2], counter[..., 3] = epoch, np.arange(blocks)
    # The key's upper word carries the purpose, and what a seed has above 32 bits.
    bits = philox(counter.reshape(-1, 4), seed & 0xFFFFFFFF, purpose ^ (seed >> 32 << 8) & 0xFFFFFFFF)
    return bits.reshape(len(ids), -1)[:, :count].astype(np.float64) * 2.0**-32


def philox(counter: NDArray[np.uint64], key0: int, key1: int) -> NDArray[np.uint64]:
    """Philox4x32-10: counters uint64 [n, 4] of 32 bits each -> random bits uint64 [n, 4] of 32 bits each."""
    c0, c1, c2, c3 = (np.ascontiguousarray(counter[:, i]) for i in range(4))
    mask, low = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> low) ^ c1 ^ np.uint64(key0), p1 & mask, (p0 >> low) ^ c3 ^ np.uint64(key1), p0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def _flips(seed: int, epoch: int, ids: NDArray[np.int64]) -> Ints:
    return (uniform(seed, FLIP, epoch, ids, 1)[:, 0] < 0.5).astype(np.int32)


def _between(u: Floats, low: float, high: float) -> Floats:
    return low + u * (high - low)


def _centre(sizes: NDArray[np.int64], ratio: tuple[float, float]) -> Ints:
    """The largest centred window whose ratio is allowed: [n, 4]."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    w = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    h = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1).astype(np.int32)
