"""What an image costs in this loader, beside DALI's own reader and the Pillow loaders, on the same real JPEGs.

    python -m benchmarks.loader --data DIR [--rounds 7] [--quick] [--json FILE]

DIR is a folder of class folders, or a dataset that `jobs.pack` wrote. Every contender crops at random (area 0.08 to 1),
resizes to 224 px, mirrors, and hands over torch tensors in batches of 64. All take short turns, several in a round, so
that a noisy machine is noisy for all; a turn is over when the contender has also made again what it had ready at its
start. CPU seconds are those of the process, its threads and its workers. Ratios are taken within a round; their median
and quartiles are printed.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipelines.augment import Augment, train_geometry
from pipelines.batches import TrainBatches
from pipelines.dataset import Dataset, open_dataset
from pipelines.digest import digest
from pipelines.errors import SkiplaneError
from pipelines.order import Order
from pipelines.pack import pack
from pipelines.quarantine import Quarantine
from pipelines.reader import Reader
from pipelines.sources.folder import folder

OURS = "skiplane, uint8"
NATIVE = ("DALI reader, float32", "DALI reader, uint8")
PILLOW = ("DataLoader + Pillow", "webdataset + Pillow")
TARGETS = {**dict.fromkeys(NATIVE, 1.00), **dict.fromkeys(PILLOW, 0.60)}  # our CPU seconds to theirs, at most
SHARDS = 8  # at least so many tars, that workers have something to share


@dataclass(frozen=True)
class Setting:
    size: int = 224  # px
    batch: int = 64
    batches: int = 4  # of a turn
    turns: int = 4  # of every contender in a round, one after the other
    rounds: int = 7
    threads: int = 2  # decoding threads, or worker processes


QUICK = {"size": 32, "batch": 8, "batches": 2, "turns": 1, "rounds": 2}


@dataclass(frozen=True)
class Cost:
    """Of a turn, or of the turns of a round."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


def main(argv: Sequence[str] | None = None) -> int:
    args, setting = _settings(argv)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        dataset = _dataset(args.data, Path(scratch))
        contenders = _contenders(dataset, setting, Path(scratch), stack)
        costs = _measure(contenders, setting)
        host = _host(dataset, setting)
    rows = {name: _row(name, its, costs, setting) for name, its in costs.items()}
    _print(rows, host, setting)
    if args.json:
        result = {
            "setting": asdict(setting),
            "images": dataset.splits["train"].samples,
            "loaders": rows,
            "host_us": host,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="class folders of JPEGs, or a packed dataset")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help=f"small: {QUICK}")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in asdict(Setting()) if getattr(args, name) is not None}
    return args, Setting(**((QUICK if args.quick else {}) | given))


def _dataset(data: Path, scratch: Path) -> Dataset:
    if (data / "dataset.json").exists():
        return open_dataset(data)
    source = folder(data, data)
    images = len(source.splits["train"])
    shard_samples = max(1, images // SHARDS)
    return pack(source, scratch / "packed", seed=0, shard_samples=shard_samples, progress=lambda *_: None)


def _contenders(dataset: Dataset, setting: Setting, scratch: Path, stack: ExitStack) -> dict[str, Iterator[Any]]:
    """Each an endless iterator of batches whose images are a torch tensor."""
    shards = [str(dataset.root / shard.name) for shard in dataset.splits["train"].shards]
    files = peers.unpack(shards, scratch / "files")
    size, batch, threads = setting.size, setting.batch, setting.threads
    pixels = peers.Pixels(size, IMAGENET_MEAN, IMAGENET_STD)
    ours = stack.enter_context(_ours(dataset, setting))
    return {
        OURS: (b.images for b in ours),
        NATIVE[0]: peers.dali_reader(shards, size, batch, threads, (IMAGENET_MEAN, IMAGENET_STD)),
        NATIVE[1]: peers.dali_reader(shards, size, batch, threads),
        PILLOW[0]: peers.torch_dataloader(files, pixels, batch, threads),
        PILLOW[1]: peers.webdataset_loader(shards, pixels, batch, threads),
    }


def _ours(dataset: Dataset, setting: Setting) -> TrainBatches:
    return TrainBatches(
        Reader(dataset, "train", setting.threads),
        _order(dataset, setting),
        Augment(size=setting.size),
        lanes=range(1),
        seed=0,
        start=0,
        stop=10**9,
        device=torch.device("cpu"),
        decode="cpu",
        threads=setting.threads,
        prefetch=2,
        quarantine=Quarantine(0),
    )


def _order(dataset: Dataset, setting: Setting) -> Order:
    return Order(dataset.splits["train"].counts, seed=0, streams=1, lanes=1, micro_batch=setting.batch)


def _measure(contenders: dict[str, Iterator[Any]], setting: Setting) -> dict[str, list[Cost]]:
    """The cost of every round, by contender."""
    rounds: dict[str, list[Cost]] = {name: [] for name in contenders}
    for images in contenders.values():
        _turn(images, setting)  # warms caches, fills queues
    for _ in range(setting.rounds):
        costs = dict.fromkeys(contenders, Cost())
        for turn in range(setting.turns):
            for name in list(contenders)[:: -1 if turn % 2 else 1]:
                costs[name] += _turn(contenders[name], setting)
        for name, cost in costs.items():
            rounds[name].append(cost)
    return rounds


def _turn(images: Iterator[Any], setting: Setting) -> Cost:
    """Takes some batches, then waits until the threads rest: what was ready at the start is ready again."""
    wall, cpu = time.perf_counter(), _cpu_s()
    for _ in range(setting.batches):
        assert len(next(images)) == setting.batch
    while True:
        ended, used = time.perf_counter(), _cpu_s()
        time.sleep(0.05)
        if _cpu_s() - used < 0.005:
            return Cost(ended - wall, used - cpu)


def _cpu_s() -> float:
    """CPU seconds of this process and its workers so far; the workers' in steps of 10 ms."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    workers = [psutil.Process(worker.pid).cpu_times() for worker in multiprocessing.active_children() if worker.pid]
    return usage.ru_utime + usage.ru_stime + sum(times.user + times.system for times in workers)


def _host(dataset: Dataset, setting: Setting) -> dict[str, float]:
    """Microseconds of one thread an image, for everything that is not decoding."""
    reader, order, augment = Reader(dataset, "train", 1), _order(dataset, setting), Augment(size=setting.size)
    steps = range(order.steps_per_epoch)
    ids = [order.ids(0, step, [0]).ravel() for step in steps]
    encoded = [reader.read(i) for i in ids]
    slots = np.arange(setting.batch)

    def microseconds(work: Callable[[int], object]) -> float:
        best = min(_seconds(work, steps) for _ in range(5))
        return best / (len(steps) * setting.batch) * 1e6

    return {
        "order": microseconds(lambda s: order.ids(0, s, [0])),
        "read and check": microseconds(lambda s: reader.read(ids[s])),
        "crops": microseconds(lambda s: train_geometry(augment, 0, 0, ids[s], encoded[s].sizes)),
        "digest": microseconds(lambda s: digest(0, s, slots, ids[s], encoded[s].crc32)),
    }


def _seconds(work: Callable[[int], object], steps: range) -> float:
    began = time.thread_time()
    for step in steps:
        work(step)
    return time.thread_time() - began


def _row(name: str, its: list[Cost], costs: dict[str, list[Cost]], setting: Setting) -> dict[str, Any]:
    images = setting.batch * setting.batches * setting.turns
    ratios = [ours.cpu_s / other.cpu_s for ours, other in zip(costs[OURS], its, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "images_per_second": statistics.median(images / cost.wall_s for cost in its),
        "cpu_s_per_1000": statistics.median(cost.cpu_s for cost in its) / images * 1000,
        "our_cpu_to_its": middle,
        "our_cpu_to_its_quartiles": [low, high],
        "target": TARGETS.get(name),
        "met": middle <= TARGETS[name] if name in TARGETS else None,
    }


def _print(rows: dict[str, dict[str, Any]], host: dict[str, float], setting: Setting) -> None:
    images = setting.batch * setting.batches * setting.turns
    table = Table(title=f"{setting.rounds} rounds of {images} images, {setting.threads} threads")
    for column in ("loader", "images/s", "CPU s / 1000", "our CPU to its (quartiles)", "target"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, row in rows.items():
        low, high = row["our_cpu_to_its_quartiles"]
        ratio = "" if name == OURS else f"{row['our_cpu_to_its']:.3f} ({low:.3f} .. {high:.3f})"
        target = "" if row["target"] is None else f"{row['target']:.2f} {'met' if row['met'] else 'MISSED'}"
        table.add_row(name, f"{row['images_per_second']:.0f}", f"{row['cpu_s_per_1000']:.2f}", ratio, target)
    console = Console()
    console.print(table)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in host.items())
    console.print(f"host time without the decode: {sum(host.values()):.1f} us an image of one thread ({parts})")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SkiplaneError as error:
        raise SystemExit(f"error: {error}") from error
