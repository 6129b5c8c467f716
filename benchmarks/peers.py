"""The loaders that people use, written as their manuals do it: what this project's loader is measured against."""

import math
import random
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

Channels = tuple[float, float, float]
FORK: dict[str, Any] = {"multiprocessing_context": "fork"}  # cheap workers, as on Linux by default


@dataclass(frozen=True)
class Pixels:
    """torchvision's RandomResizedCrop, flip, ToTensor and Normalize on a Pillow image: float32 [3, size, size]."""

    size: int
    mean: Channels
    std: Channels

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        left, top, width, height = _window(*image.size)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        made = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return made.sub_(mean).div_(std)


def _window(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def dali_reader(
    shards: Sequence[str], size: int, batch: int, threads: int, normalise: tuple[Channels, Channels] | None = None
) -> Iterator[torch.Tensor]:
    """DALI's webdataset reader and random crop; uint8 NHWC, or float32 NCHW where (mean, std) is given."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, seed=0)
    def graph() -> Any:
        encoded, _ = fn.readers.webdataset(paths=list(shards), ext=["jpg", "cls"], random_shuffle=True)  # type: ignore[misc]
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], output_type=types.RGB
        )
        images = fn.resize(images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
        mirror = fn.random.coin_flip()
        if normalise is None:
            return fn.flip(images, horizontal=mirror)
        mean, std = ([255 * value for value in values] for values in normalise)
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=mean,
            std=std,
            mirror=mirror,
        )

    pipe = graph()
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield torch.utils.dlpack.from_dlpack(images.as_tensor())


class Files(Dataset[torch.Tensor]):
    """Images in files, as torchvision's ImageFolder."""

    def __init__(self, paths: Sequence[Path], pixels: Pixels) -> None:
        self.paths, self.pixels = paths, pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return self.pixels(image)


def torch_dataloader(files: Sequence[Path], pixels: Pixels, batch: int, workers: int) -> Iterator[torch.Tensor]:
    """torch's DataLoader with worker processes. Endless."""
    chosen = RandomSampler(files, replacement=True, num_samples=sys.maxsize // batch)
    yield from DataLoader(Files(files, pixels), batch, sampler=chosen, num_workers=workers, **FORK)


def webdataset_loader(shards: Sequence[str], pixels: Pixels, batch: int, workers: int) -> Iterator[torch.Tensor]:
    """webdataset with Pillow in the DataLoader's worker processes. Endless."""
    import webdataset

    data = webdataset.WebDataset(list(shards), resampled=True, shardshuffle=False).shuffle(100).decode("pil")
    data = data.to_tuple("jpg").map_tuple(pixels).batched(batch, partial=False)
    for (images,) in webdataset.WebLoader(data, batch_size=None, num_workers=workers, **FORK):
        yield images


def unpack(shards: Sequence[str], out: Path) -> list[Path]:
    """The images of some tars as files, for those who read files."""
    out.mkdir(parents=True)
    paths: list[Path] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    paths.append(out / f"{len(paths):08d}.jpg")  # names from an archive are not trusted
                    file = tar.extractfile(member)
                    paths[-1].write_bytes(file.read() if file else b"")
    return paths
