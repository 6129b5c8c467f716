"""What planning an epoch costs, in seconds and bytes; and how soon a run that resumes has its first batch.

    python -m benchmarks.plan --data DIR [--rounds 5] [--quick] [--json FILE]

DIR is a folder of class folders, or a dataset that `jobs.pack` wrote.

Planning is measured for an epoch of ImageNet's size and for one of 100 million samples. Seconds are the best of a few
runs, with nothing kept from one to the next; bytes are those that Python and NumPy hold, measured in another run.

Resuming is measured on a dataset with as many records and shards as ImageNet has, each record a real JPEG: a few tars
of 1,250 images, and hard links to them. It ends with the first batch of 32 images at 224 px, of a worker with one lane
of eight: from a folder, from an HTTP server on this host, and from one behind a link of 100 MB/s that all requests
share, both with an empty cache. Beside it stands what a loader without positions has to do: webdataset reads the
samples of its eighth of the epoch again, measured over some and scaled.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.resuming import STAGES, Shape, enlarged, first_batch, skipping, written
from benchmarks.servers import Server
from pipelines.dataset import Dataset, Shard, open_dataset
from pipelines.errors import SkiplaneError
from pipelines.index import RECORD
from pipelines.order import Order
from pipelines.reader import Reader
from pipelines.remote.needs import Needs

WINDOW = 16  # shards, as in the ImageNet recipes
NODE = 8  # lanes of a node
AT = (0.0, 0.9)  # of the epoch
TARGET_S = 1.0  # to the first batch, whatever the position
LINK = 100  # MB/s, of the slower server: about a gigabit a second
PLACES = ("folder", "http", f"http, {LINK} MB/s")
T = TypeVar("T")
CONSOLE = Console(width=140)
ENOUGH_S, MOST_RUNS = 2.0, 3
IMPORTS = ["benchmarks.resuming", "nvidia.dali.pipeline", "webdataset"]


@dataclass(frozen=True)
class Setting:
    samples: int = 1_281_167
    large: int = 100_000_000  # samples
    large_lanes: int = 64
    shard_samples: int = 1250
    micro_batch: int = 32
    size: int = 224  # px
    threads: int = 2
    distinct: int = 8  # real tars
    skipped: int = 5000  # samples, by webdataset
    rounds: int = 5


QUICK = {
    "samples": 790,
    "large": 5000,
    "shard_samples": 20,
    "micro_batch": 4,
    "size": 32,
    "distinct": 2,
    "skipped": 50,
    "rounds": 2,
}


@dataclass(frozen=True)
class Cost:
    seconds: float
    peak: int  # bytes
    held: int  # bytes that the result and what it cached keep


def main(argv: Sequence[str] | None = None) -> int:
    args, setting = _settings(argv)
    with tempfile.TemporaryDirectory() as scratch:
        epochs = _epochs(setting)
        planning = {name: _planning(*epoch, Path(scratch)) for name, epoch in epochs.items()}
        _print_planning(planning)
        resuming = _resuming(args.data, setting, Path(scratch))
    _print_resuming(resuming, setting)
    if args.json:
        plans = {name: {what: asdict(cost) for what, cost in costs.items()} for name, costs in planning.items()}
        result = {"setting": asdict(setting), "planning": plans, "resuming": resuming}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(prog="benchmarks.plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="class folders of JPEGs, or a packed dataset")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help=f"small: {QUICK}")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in asdict(Setting()) if getattr(args, name) is not None}
    return args, Setting(**((QUICK if args.quick else {}) | given))


# -- planning ----------------------------------------------------------------------------------------------------------


def _epochs(setting: Setting) -> dict[str, tuple[list[int], Shape]]:
    """Samples of each shard, and the shape."""
    sizes = ((setting.samples, NODE), (setting.large, setting.large_lanes))
    return {
        f"{samples:,} samples, {lanes} lanes, window {window}": (
            _counts(samples, setting.shard_samples),
            Shape(lanes, lanes, setting.micro_batch, window),
        )
        for samples, lanes in sizes
        for window in (WINDOW, 0)
    }


def _counts(samples: int, each: int) -> list[int]:
    return [each] * (samples // each) + [samples % each] * (samples % each > 0)


def _planning(counts: list[int], shape: Shape, scratch: Path) -> dict[str, Cost]:
    """Of a node with NODE lanes, or a worker with one of them."""
    first = shape.order(counts)
    late = int(max(AT) * first.steps_per_epoch)
    planned = Needs(shape.order(counts), range(NODE), epochs=3)
    planned.upcoming(late)
    costs = {
        "ids of step 0, 1 lane": _cost(lambda: _asked(shape.order(counts), 0, 1)),
        f"ids of a step at {max(AT):.0%}, 1 lane": _cost(lambda: _asked(shape.order(counts), late, 1)),
        f"ids of a step at {max(AT):.0%}, {NODE} lanes": _cost(lambda: _asked(shape.order(counts), late, NODE)),
        "all ids of an epoch": _cost(lambda: _all_ids(shape.order(counts))),
        f"needs of {NODE} lanes": _cost(lambda: _needs(shape.order(counts), late)),
        f"needs of {NODE} lanes, asked again": _cost(lambda: planned.upcoming(late)),
    }
    if shape.window:  # the others do not depend on it
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            place = _without_shards(counts, Path(folder))
            costs["dataset.json"] = _cost(lambda: open_dataset(place))
            dataset = open_dataset(place)
            costs[f"index, {RECORD.itemsize} bytes a sample"] = _cost(lambda: Reader(dataset, "train"))
    return costs


def _asked(order: Order, step: int, lanes: int) -> Order:
    order.ids(0, step, range(lanes))
    return order


def _all_ids(order: Order) -> Order:
    for stream in range(order.streams):
        order.stream(0, stream)
    return order


def _needs(order: Order, step: int) -> Needs:
    needs = Needs(order, range(NODE), epochs=3)
    needs.upcoming(step)
    return needs


def _without_shards(counts: list[int], place: Path) -> Path:
    """A dataset whose tars are not there."""
    shards = [Shard(f"train-{i:06d}.tar", n, 110_000 * n, f"{i:064x}") for i, n in enumerate(counts)]
    records = np.zeros(sum(counts), RECORD)
    records["shard"] = np.repeat(np.arange(len(counts)), counts)
    written(place, tuple(f"n{i:08d}" for i in range(1000)), shards, records)
    return place


def _cost(work: Callable[[], Any]) -> Cost:
    seconds: list[float] = []
    while len(seconds) < MOST_RUNS and sum(seconds) < ENOUGH_S:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    gc.collect()
    tracemalloc.start()
    result = work()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return Cost(min(seconds), peak, held)


# -- resuming ----------------------------------------------------------------------------------------------------------


def _resuming(data: Path, setting: Setting, scratch: Path) -> dict[str, Any]:
    """Of each place: the rounds of each position, and webdataset's seconds to the later one."""
    counts = _counts(setting.samples, setting.shard_samples)
    shape = Shape(NODE, NODE, setting.micro_batch, WINDOW)
    dataset = enlarged(data, scratch, counts, setting.distinct)
    rounds: dict[str, list[dict[str, float]]] = {f"{place}, {share:.0%}": [] for place in PLACES for share in AT}
    with Server("http", dataset.root) as fast, Server("http", dataset.root, LINK) as slow:
        roots = dict(zip(PLACES, (str(dataset.root), fast.url, slow.url), strict=True))
        for number in range(-1, setting.rounds):  # the first round warms up, and is not counted
            for place in PLACES:
                for share in AT:
                    with tempfile.TemporaryDirectory(dir=scratch) as cache:
                        where = (roots[place], Path(cache), shape, share)
                        stages = _alone(first_batch, *where, setting.size, setting.threads)
                    if number >= 0:
                        rounds[f"{place}, {share:.0%}"].append(stages)
        skipped = {place: _skipped(dataset, roots[place], setting) for place in PLACES}
    return {"skiplane": rounds, "webdataset": skipped}


def _skipped(dataset: Dataset, root: str, setting: Setting) -> dict[str, float]:
    """What webdataset needs to get there: a worker's part of the epoch, whose shards are its own."""
    own = [f"{root}/{shard.name}" for shard in dataset.splits["train"].shards[::NODE]]
    each = _alone(skipping, own, setting.skipped)
    images = max(AT) * setting.samples / NODE
    return {"measured_samples": setting.skipped, "us_a_sample": each * 1e6, "samples": images, "seconds": each * images}


def _alone(work: Callable[..., T], *args: Any) -> T:
    """In a process of its own, which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(work, *args).result()


# -- words -------------------------------------------------------------------------------------------------------------


def _print_planning(planning: dict[str, dict[str, Cost]]) -> None:
    for name, costs in planning.items():
        table = Table(title=name)
        for heading in ("", "ms", "peak MB", "kept MB"):
            table.add_column(heading, justify="right" if heading else "left")
        for what, cost in costs.items():
            table.add_row(what, f"{1000 * cost.seconds:,.2f}", f"{cost.peak / 1e6:,.1f}", f"{cost.held / 1e6:,.1f}")
        CONSOLE.print(table)


def _print_resuming(resuming: dict[str, Any], setting: Setting) -> None:
    title = f"seconds to the first batch, {setting.samples:,} samples: median of {setting.rounds} rounds"
    table = Table(title=title, caption=", ".join(f"{stage}: {what}" for stage, what in STAGES.items()))
    for heading in ("", "in all", "least .. most", *STAGES, "target"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, rounds in resuming["skiplane"].items():
        sums = [sum(stages.values()) for stages in rounds]
        parts = [f"{statistics.median(stages[stage] for stages in rounds):.3f}" for stage in STAGES]
        middle = statistics.median(sums)
        met = f"{TARGET_S:.1f} {'met' if middle < TARGET_S else 'MISSED'}"
        table.add_row(f"skiplane, {name}", f"{middle:.3f}", f"{min(sums):.3f} .. {max(sums):.3f}", *parts, met)
    for place, told in resuming["webdataset"].items():
        table.add_row(f"webdataset, {place}, {max(AT):.0%}: scaled", f"{told['seconds']:.1f}")
    CONSOLE.print(table)
    for place, told in resuming["webdataset"].items():
        CONSOLE.print(
            f"webdataset, {place}: {told['samples']:,.0f} samples skipped at {told['us_a_sample']:.0f} us each, as "
            f"measured over {told['measured_samples']:,}; one process a worker, more of them divide it"
        )


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SkiplaneError as error:
        raise SystemExit(f"error: {error}") from error
