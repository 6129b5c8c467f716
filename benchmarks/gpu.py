"""What one GPU does: images a second with real JPEGs, without any data work, and without the net; memory; pixels.

    python -m benchmarks.gpu [--data DATASET] [--quick] [--json FILE]

ResNet-50 at 224 px in bf16, channels_last, through the product's own loop, step and batches. Needs torch, DALI, NumPy
and pydantic, no cluster and no tracking. DATASET is a packed one (python -m jobs.pack); without it, photograph-like
JPEGs are made first, and the output says so. Without a GPU the same code runs on the CPU, and every figure of a GPU
reads 'not measured yet'.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_report import (
    ALONE,
    CEILING,
    DEVICE,
    ENGINE,
    LOADS,
    PLACE,
    SHARE,
    TORCH,
    TRAIN,
    Pixels,
    Row,
    columns,
    difference,
    table,
)
from benchmarks.photographs import synthesise
from jobs import edge
from orchestrator.training import loop
from orchestrator.training.determinism import deterministic
from orchestrator.training.models.arch import Arch
from orchestrator.training.models.resnet import build
from orchestrator.training.schedule import constant
from orchestrator.training.step import TrainStep, check_finite
from pipelines.augment import Augment, Geometry, eval_geometry, train_geometry
from pipelines.batches import SyntheticBatches, TrainBatches
from pipelines.dali import Decoder, Where
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import ConfigError
from pipelines.order import Order
from pipelines.quarantine import Quarantine
from pipelines.reader import EncodedBatch, Reader, joined

LR = 1e-3  # small: the loss must stay finite, what it is does not matter


@dataclass(frozen=True)
class Setting:
    """What the figures depend on, besides the machine."""

    depth: int = 50
    width: int = 64
    size: int = 224  # px
    batch: int = 256
    lanes: int = 8  # BatchNorm sees batch / lanes images
    threads: int = len(os.sched_getaffinity(0))  # that read and decode
    prefetch: int = 2  # batches
    images: int = 512  # made where there is no --data
    warmup: int = 10  # steps
    rounds: int = 5
    steps: int = 20  # of a round


QUICK = {"width": 8, "size": 32, "batch": 8, "lanes": 2, "images": 16, "warmup": 1, "rounds": 2, "steps": 2}


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 measured, 2 setting, 3 data."""
    setting, data, file = _settings(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    deterministic(False)
    with ExitStack() as stack:
        dataset = open_dataset(data) if data else _made(setting, stack)
        reader = Reader(dataset, "train", setting.threads)
        stack.callback(reader.close)
        try:
            bench = Bench(setting, dataset, reader, device)
        except ValueError as error:  # numbers that do not fit each other, or the data
            raise ConfigError(str(error)) from error
        rows = bench.rows()
        about = {"setting": asdict(setting), "machine": _machine(device), "data": _described(dataset, bool(data))}
    shown = columns(rows, device.type == "cuda")
    edge.say(table(shown))
    if file:
        file.write_text(json.dumps(about | shown, indent=2) + "\n")
    return 0


def _made(setting: Setting, stack: ExitStack) -> Dataset:
    edge.say(f"no --data: making {setting.images} photograph-like JPEGs; real files, invented pictures")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="skiplane-gpu-"))
    return synthesise(Path(folder, "photographs"), setting.images, setting.threads)


class Bench:
    """The measurements on one device."""

    def __init__(self, setting: Setting, dataset: Dataset, reader: Reader, device: torch.device) -> None:
        self.setting, self.reader, self.device, self.cuda = setting, reader, device, device.type == "cuda"
        self.classes, micro_batch = len(dataset.classes), setting.batch // setting.lanes
        self.order = Order(dataset.splits["train"].counts, 0, 1, setting.lanes, micro_batch)
        self.augment = Augment(size=setting.size)
        self.stop = setting.warmup + setting.rounds * setting.steps
        self.step = TrainStep(
            build(Arch(depth=setting.depth, width=setting.width, classes=self.classes), 0),
            lanes=setting.lanes,
            total_lanes=setting.lanes,
            micro_batch=micro_batch,
            precision="bf16",
            channels_last=True,
            device=device,
        )

    def rows(self) -> dict[str, Row]:
        """Everything, one after the other: a device does one thing at a time."""
        rows = {CEILING: self._train(self._synthetic())}
        places: tuple[Where, ...] = ("gpu", "cpu") if self.cuda else ("cpu",)
        for place in places:
            rows[TRAIN[place]] = self._train(self._jpegs(place))
            if place == "gpu":
                rows |= self._memory()
            with self._jpegs(place) as batches:
                rows[ALONE[place]] = self._timed(iter(batches))
        return rows | self._pixels()

    def _train(self, batches: SyntheticBatches | TrainBatches) -> Row:
        """Images/s of the whole loop, and the share of its time that went by waiting for data."""
        waits: list[float] = []

        def turns() -> Iterator[None]:
            epoch = self.order.steps_per_epoch
            for done in loop.train(
                self.step, batches, constant(LR, self.stop), steps_per_epoch=epoch, start=0, stop=self.stop
            ):
                waits.append(done.wait_s)
                yield
            check_finite(done.stats)

        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with batches:
            row = self._timed(turns())
        return row | {"waiting_for_data": sum(waits[self.setting.warmup :]) / row["seconds"]}

    def _timed(self, turns: Iterator[Any]) -> Row:
        """Images/s by round. The warm-up before them uses up what was made ahead."""
        self._take(turns, self.setting.warmup)
        seconds = [self._take(turns, self.setting.steps) for _ in range(self.setting.rounds)]
        next(turns, None)  # what a generator does after its last item
        rates = [self.setting.steps * self.setting.batch / s for s in seconds]
        return {"images_per_s": statistics.median(rates), "range": [min(rates), max(rates)], "seconds": sum(seconds)}

    def _take(self, turns: Iterator[Any], count: int) -> float:
        """Seconds for so many turns, until the device has done them."""
        began = time.perf_counter()
        for _ in range(count):
            next(turns)
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def _memory(self) -> dict[str, Row]:
        """After training with decode on the GPU. DALI's pools do not shrink, so what the device holds is their peak."""
        free, total = torch.cuda.mem_get_info(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        return {TORCH: {"gib": peak / 2**30}, DEVICE: {"gib": (total - free) / 2**30}}

    def _synthetic(self) -> SyntheticBatches:
        return SyntheticBatches(
            n=self.setting.batch,
            size=self.setting.size,
            classes=self.classes,
            start=0,
            stop=self.stop,
            steps_per_epoch=self.order.steps_per_epoch,
            device=self.device,
        )

    def _jpegs(self, decode: Where) -> TrainBatches:
        return TrainBatches(
            self.reader,
            self.order,
            self.augment,
            lanes=range(self.setting.lanes),
            seed=0,
            start=0,
            stop=self.stop,
            device=self.device,
            decode=decode,
            threads=self.setting.threads,
            prefetch=self.setting.prefetch,
            quarantine=Quarantine(0),
        )

    def _pixels(self) -> dict[str, Row]:
        """The same images decoded in several ways, each cropped once as for training and once as for evaluation."""
        ids = np.tile(np.arange(min(self.setting.batch, self.reader.split.samples)), 2)
        encoded = self.reader.read(ids)
        geometry = self._geometry(encoded)
        back = np.arange(len(ids))[::-1].copy()
        reversed_ = joined([encoded.row(int(i)) for i in back]), geometry.take(back)
        cpu = self._decoded(encoded, geometry, "cpu")
        if not self.cuda:
            return {PLACE: difference(self._decoded(*reversed_, "cpu")[back], cpu)}
        gpu = {load: self._decoded(encoded, geometry, "gpu", load) for load in LOADS}
        rows = {ENGINE[load]: difference(pixels, cpu) for load, pixels in gpu.items()}
        rows[SHARE] = max((difference(gpu[load], gpu[0.0]) for load in LOADS), key=lambda row: float(row["mean"]))
        return rows | {PLACE: difference(self._decoded(*reversed_, "gpu")[back], gpu[0.65])}

    def _geometry(self, encoded: EncodedBatch) -> Geometry:
        half, size = len(encoded) // 2, self.setting.size
        train = train_geometry(self.augment, 0, 0, encoded.ids[:half], encoded.sizes[:half])
        whole = eval_geometry(size * 256 // 224, size, encoded.sizes[half:])
        names = [field.name for field in fields(Geometry)]
        return Geometry(*(np.concatenate([getattr(train, name), getattr(whole, name)]) for name in names))

    def _decoded(self, encoded: EncodedBatch, geometry: Geometry, where: Where, load: float = 0.65) -> Pixels:
        device = self.device.index if where == "gpu" else None
        decoder = Decoder(self.setting.size, where, device, self.setting.threads, len(encoded), load)
        return decoder.decode(encoded, geometry).cpu().numpy().copy()


def _machine(device: torch.device) -> Row:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}


def _described(dataset: Dataset, given: bool) -> Row:
    split = dataset.splits["train"]
    kib = float(dataset.index("train")["size"].mean()) / 1024
    return {"source": str(dataset.root) if given else "synthesised", "images": split.samples, "mean_kib": kib}


def _settings(argv: Sequence[str]) -> tuple[Setting, Path | None, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, help=f"default {value}")
    parser.add_argument("--data", type=Path, metavar="DATASET", help="a packed dataset; else images are made")
    parser.add_argument("--quick", action="store_true", help=f"tiny: {QUICK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    given = vars(parser.parse_args(argv))
    data, file, quick = given.pop("data"), given.pop("json"), given.pop("quick")
    chosen = {name: value for name, value in given.items() if value is not None}
    setting = Setting(**(QUICK if quick else {}) | chosen)
    for name in QUICK:
        if name != "warmup" and getattr(setting, name) < 1:
            parser.error(f"--{name} is {getattr(setting, name)}; at least 1 is needed")
    if setting.batch % setting.lanes:
        parser.error(f"--batch is {setting.batch}, which --lanes = {setting.lanes} does not divide")
    return setting, data, file


if __name__ == "__main__":
    edge.run(main)
