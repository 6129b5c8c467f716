"""Photograph-like images as a dataset of JPEGs, with NumPy alone: where neither photographs nor an image library are.

What decoding costs depends on a picture's size, on how its colours are sampled, and on its bytes. So these have sizes
that are usual in ImageNet, their colours are sampled 4:2:0 as cameras do it, and their spectrum falls with frequency
much as that of natural scenes does (Field 1987), which at this quality gives ImageNet's 110 KB an image. The same seed
gives the same pictures. One takes about 60 ms of a core.
"""

import io
import json
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import MANIFEST, Dataset, Shard, Split, file_sha256, manifest, open_dataset
from pipelines.index import BLOCK, RECORD, write_index

Pixels = NDArray[np.uint8]  # [height, width, 3] RGB
Ints = NDArray[np.int64]

SIZES = ((375, 500), (500, 375), (333, 500), (500, 333), (500, 500))  # px
CLASSES = 1000
QUALITY = 90
FALL = 1.1
CONTRAST = (52.0, 14.0)  # standard deviations of brightness and colour, in levels of 255
# Annex K of ITU T.81: quantisation of brightness and colour in zigzag order, and the Huffman codes of brightness, which
# serve colour as well here.
QUANTA = (
    "16 11 12 14 12 10 16 14 13 14 18 17 16 19 24 40 26 24 22 22 24 49 35 37 29 40 58 51 61 60 57 51 56 55 64 72 92 78"
    " 64 68 87 69 55 56 80 109 81 87 95 98 103 104 103 62 77 113 121 112 100 120 92 101 103 99",
    "17 18 18 24 21 24 47 26 26 47 99 66 56 66" + " 99" * 50,
)
DC = bytes.fromhex("00010501010101010100000000000000" + "000102030405060708090a0b")  # counts by length 1..16, symbols
AC = bytes.fromhex(
    "0002010303020403050504040000017d"
    "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728292a343536373839"
    "3a434445464748494a535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999aa2a3a4a5a6a7"
    "a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
)
ZIGZAG = np.array(sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8)))
COSINE = np.cos(np.outer(np.arange(8), 2 * np.arange(8) + 1) * np.pi / 16) / 2 * ([[0.5**0.5]] + [[1]] * 7)
COMPONENTS = (slice(0, 4), slice(4, 5), slice(5, 6))  # blocks of an MCU
RGB_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # JFIF


def synthesise(folder: Path, count: int, threads: int = 1) -> Dataset:
    """Makes a dataset of `count` images in one shard; their labels mean nothing. Validation is the same images."""
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(threads) as pool:
        images = list(pool.map(lambda i: encode(photograph(*SIZES[i % len(SIZES)], seed=i)), range(count)))
    tar = folder / "train-000000.tar"
    index_sha256 = write_index(folder / "train.index", _write_tar(tar, images))
    shard = Shard(tar.name, count, tar.stat().st_size, file_sha256(tar))
    splits = {name: Split(name, (shard,), "train.index", index_sha256) for name in ("train", "val")}
    document = manifest(tuple(str(i) for i in range(CLASSES)), splits, {"source": "photographs", "quality": QUALITY})
    (folder / MANIFEST).write_text(json.dumps(document))
    return open_dataset(folder)


def _write_tar(path: Path, images: list[bytes]) -> NDArray[np.void]:
    records = np.zeros(len(images), RECORD)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, data in enumerate(images):
            where, label = tar.offset // BLOCK + 1, i % CLASSES  # the data follow a header of one block
            records[i] = (0, where, len(data), zlib.crc32(data), label, *SIZES[i % len(SIZES)])
            for kind, content in (("jpg", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:08d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return records


def photograph(height: int, width: int, seed: int) -> Pixels:
    """A random image whose spectrum is that of natural scenes."""
    noise = np.random.default_rng(seed).standard_normal((3, height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # the mean is set below
    planes = np.fft.irfft2(np.fft.rfft2(noise) / frequency**FALL, (height, width))
    planes *= np.array([CONTRAST[0], CONTRAST[1], CONTRAST[1]])[:, None, None] / planes.std((1, 2), keepdims=True)
    rgb = 128 + np.tensordot(planes, np.linalg.inv(RGB_TO_YCC), (0, 1))
    return np.rint(np.clip(rgb, 0, 255)).astype(np.uint8)


def encode(image: Pixels, quality: int = QUALITY) -> bytes:
    """A baseline JPEG, 4:2:0, with the tables of ITU T.81 and libjpeg's meaning of quality (1..100)."""
    quanta = [_quanta(table, quality) for table in QUANTA]
    height, width, _ = image.shape
    padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), "edge")
    y, *chroma = np.moveaxis(padded @ RGB_TO_YCC.T, 2, 0)
    colour = [c.reshape(c.shape[0] // 2, 2, -1, 2).mean((1, 3)) for c in chroma]
    # An MCU is 16 x 16 px: four blocks of brightness, then one of each colour.
    units = [_blocks(y - 128, 2, quanta[0])] + [_blocks(c, 1, quanta[1]) for c in colour]
    scan = _entropy(np.concatenate(units, axis=1))
    return _head(height, width, quanta) + scan + b"\xff\xd9"


def _quanta(table: str, quality: int) -> Ints:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((np.array(table.split(), np.int64) * scale + 50) // 100, 1, 255)


def _blocks(plane: NDArray[np.float64], side: int, quanta: Ints) -> Ints:
    """[height, width] -> [MCUs, side * side, 64]: quantised cosine coefficients in zigzag order."""
    rows, columns = plane.shape[0] // (8 * side), plane.shape[1] // (8 * side)
    tiles = plane.reshape(rows, side, 8, columns, side, 8).transpose(0, 3, 1, 4, 2, 5)
    cosines = (COSINE @ tiles @ COSINE.T).reshape(rows * columns, side * side, 64)
    return np.rint(cosines[..., ZIGZAG] / quanta).astype(np.int64)


def _entropy(units: Ints) -> bytes:
    """[MCUs, 6, 64] -> the scan: for each value but zeros its run and size in Huffman's code, then its bits."""
    blocks = units.reshape(-1, 64).copy()
    blocks[:, 0] = np.concatenate([_steps(units[:, part, 0]) for part in COMPONENTS], axis=1).ravel()
    block, place = np.nonzero((blocks != 0) | (np.arange(64) == 0))  # a block's first is written even where it is 0
    value, first = blocks[block, place], place == 0
    run = np.where(first, 0, np.diff(place, prepend=0) - 1)
    size = np.frexp(np.abs(value))[1].astype(np.int64)  # bits of the value
    code, length = np.where(first[:, None], _codes(DC)[size], _codes(AC)[run % 16 << 4 | size]).T
    word, bits = code << size | value + np.where(value < 0, (1 << size) - 1, 0), length + size
    # All that belongs to a value makes one word of at most 63 bits: before it 16 zeros up to three times, ...
    (fill, fill_bits), (end, end_bits) = _codes(AC)[0xF0], _codes(AC)[0]
    fills = np.array([0, fill, fill << fill_bits | fill, (fill << fill_bits | fill) << fill_bits | fill])
    word, bits = fills[run // 16] << bits | word, bits + run // 16 * fill_bits
    ends = (np.diff(block, append=-1) != 0) & (place < 63)  # ... and after it the end of its block
    return _packed(np.where(ends, word << end_bits | end, word), bits + ends * end_bits)


def _steps(dc: Ints) -> Ints:
    """Differences of neighbours in the order of the scan; the shape stays."""
    return np.diff(dc.ravel(), prepend=0).reshape(dc.shape)


def _codes(table: bytes) -> Ints:
    """[256, 2]: code and its length in bits for each symbol of a table as JPEG writes it."""
    codes, code, symbols = np.zeros((256, 2), np.int64), 0, iter(table[16:])
    for length, count in enumerate(table[:16], 1):
        for _ in range(count):
            codes[next(symbols)] = code, length
            code += 1
        code <<= 1
    return codes


def _packed(words: Ints, bits: Ints) -> bytes:
    """The words' bits one after the other, filled with ones; after a byte of ones comes one of zeros."""
    shifts = np.repeat(np.cumsum(bits), bits) - 1 - np.arange(bits.sum())
    stream = (np.repeat(words, bits) >> shifts & 1).astype(np.uint8)
    packed = np.packbits(np.concatenate([stream, np.ones(-len(stream) % 8, np.uint8)]))
    return np.insert(packed, np.flatnonzero(packed == 0xFF) + 1, 0).tobytes()


def _head(height: int, width: int, quanta: list[Ints]) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes.fromhex("012200 021101 031101")
    return b"".join(
        [
            b"\xff\xd8",
            _segment(0xE0, b"JFIF\0" + bytes.fromhex("0101 00 0001 0001 00 00")),
            *(_segment(0xDB, bytes([i, *table])) for i, table in enumerate(quanta)),
            _segment(0xC0, frame),
            _segment(0xC4, b"\x00" + DC + b"\x10" + AC),
            _segment(0xDA, bytes.fromhex("03 0100 0200 0300 003f00")),
        ]
    )


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
