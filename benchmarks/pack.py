"""How fast images become tars, beside webdataset's ShardWriter and Python's tarfile, on the same real JPEGs.

    python -m benchmarks.pack --data DIR [--images 2000] [--rounds 7] [--quick] [--json FILE]

DIR is a folder of class folders, or a dataset that `jobs.pack` wrote; its images are taken again and again until there
are enough.

    writing alone   the images are in memory, and nobody checks them. Ours makes checksums, hash and index on the way;
                    theirs do not, so that tarfile is also measured with the same checksums and hash.
    the whole       read, shuffled, written; ours also decodes each image, synchronises, hashes and goes on if it is cut
                    short. Processes are started anew each time, as the command does: seconds of imports.

All take turns in every round, so that a noisy machine is noisy for all. CPU seconds are those of the process, its
threads and its workers. Ratios are taken within a round; their median and quartiles are printed.
"""

import argparse
import hashlib
import io
import json
import resource
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.table import Table

from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import SkiplaneError
from pipelines.index import BLOCK
from pipelines.pack import pack
from pipelines.packing.packing import shuffled
from pipelines.packing.processes import Processes
from pipelines.packing.run import Here
from pipelines.packing.tar import TarWriter
from pipelines.sources import Item, Source
from pipelines.sources.folder import folder

Sample = tuple[str, bytes, int]  # key, image, label
Work = Callable[[Path], object]  # fills a folder
WRITER, ONE, TWO = "skiplane, with index and hash", "skiplane, 1 worker", "skiplane, 2 workers"


@dataclass(frozen=True)
class Setting:
    images: int = 2000
    shard_samples: int = 500
    rounds: int = 7


QUICK = {"images": 24, "shard_samples": 8, "rounds": 2}


@dataclass(frozen=True)
class Cost:
    """Of one turn."""

    wall_s: float
    cpu_s: float


def main(argv: Sequence[str] | None = None) -> int:
    args, setting = _settings(argv)
    items = _items(args.data, setting.images)
    samples = [(f"{i:08d}", item.load(), item.label) for i, item in enumerate(items)]
    parts = {"writing alone": _writers(samples, setting), "the whole": _packers(items, setting)}
    costs = {part: _measure(contenders, setting.rounds) for part, contenders in parts.items()}
    rows = {part: {name: _row(name, costs[part], setting) for name in parts[part]} for part in parts}
    size = statistics.mean(len(data) for _, data, _ in samples)
    for part in rows:
        _print(part, rows[part], setting, size)
    if args.json:
        args.json.write_text(json.dumps({"setting": asdict(setting), "image_bytes": size, **rows}, indent=2) + "\n")
    return 0


def _settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(prog="benchmarks.pack", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="class folders of JPEGs, or a packed dataset")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help=f"small: {QUICK}")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in asdict(Setting()) if getattr(args, name) is not None}
    return args, Setting(**((QUICK if args.quick else {}) | given))


def _items(data: Path, count: int) -> list[Item]:
    if (data / "dataset.json").exists():
        found = _stored(open_dataset(data))
    else:
        images = folder(data, data).splits["train"]
        found = [images[i] for i in range(len(images))]
    return [found[i % len(found)] for i in range(count)]


def _stored(dataset: Dataset) -> list[Item]:
    paths = [Path(dataset.locate(shard.name)) for shard in dataset.splits["train"].shards]
    return [
        Item(f"{row}", label, partial(_read, paths[shard], block * BLOCK, size))
        for row, (shard, block, size, _, label, _, _) in enumerate(dataset.index("train").tolist())
    ]


def _read(path: Path, begin: int, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        return file.read(size)


def _writers(samples: Sequence[Sample], setting: Setting) -> dict[str, Work]:
    cut = setting.shard_samples
    shards = [samples[first : first + cut] for first in range(0, len(samples), cut)]
    return {
        WRITER: lambda out: _each(out, shards, _ours),
        "webdataset.ShardWriter": lambda out: _shard_writer(out, samples, cut),
        "tarfile": lambda out: _each(out, shards, _tarfile),
        "tarfile, with the same hashes": lambda out: _each(out, shards, _tarfile_hashed),
    }


def _packers(items: Sequence[Item], setting: Setting) -> dict[str, Work]:
    source = Source(
        tuple(map(str, range(1 + max(item.label for item in items)))), {"train": items, "val": items[:1]}, {}
    )
    cut = {"seed": 0, "shard_samples": setting.shard_samples, "progress": lambda *_: None}
    order = shuffled(len(items), 0).tolist()

    def loaded() -> Iterable[Sample]:
        return ((f"{place:08d}", items[i].load(), items[i].label) for place, i in enumerate(order))

    return {
        ONE: lambda out: pack(source, out / "data", run=Here(1), **cut),  # type: ignore[arg-type]
        TWO: lambda out: pack(source, out / "data", run=Processes(2), **cut),  # type: ignore[arg-type]
        "webdataset.ShardWriter": lambda out: _shard_writer(out, loaded(), setting.shard_samples),
        "tarfile": lambda out: _each(out, _cut(loaded(), setting.shard_samples), _tarfile),
    }


def _cut(samples: Iterable[Sample], shard_samples: int) -> Iterable[Iterable[Sample]]:
    """Parts that are read one after the other."""
    left = iter(samples)
    for first in left:
        yield _from(first, left, shard_samples)


def _from(first: Sample, left: Iterable[Sample], count: int) -> Iterable[Sample]:
    yield first
    yield from (sample for _, sample in zip(range(count - 1), left, strict=False))


def _each(out: Path, shards: Iterable[Iterable[Sample]], write: Callable[[BinaryIO, Iterable[Sample]], object]) -> None:
    for i, samples in enumerate(shards):
        with (out / f"train-{i:06d}.tar").open("wb", buffering=1 << 20) as file:
            write(file, samples)


def _ours(file: BinaryIO, samples: Iterable[Sample]) -> None:
    tar = TarWriter(file)
    for key, image, label in samples:
        tar.add(key, image, label, 1, 1)
    tar.finish()


def _tarfile(file: BinaryIO, samples: Iterable[Sample]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            for kind, data in (("cls", str(label).encode()), ("jpg", image)):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _tarfile_hashed(file: BinaryIO, samples: Iterable[Sample]) -> None:
    hashed = _Hashed(file)
    _tarfile(hashed, hashed.seen(samples))  # type: ignore[arg-type]


class _Hashed:
    """A file that hashes what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.crcs: list[int] = []

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def seen(self, samples: Iterable[Sample]) -> Iterable[Sample]:
        for sample in samples:
            self.crcs.append(zlib.crc32(sample[1]))
            yield sample


def _shard_writer(out: Path, samples: Iterable[Sample], shard_samples: int) -> None:
    import webdataset

    with webdataset.ShardWriter(f"file:{out}/train-%06d.tar", maxcount=shard_samples, verbose=0) as writer:
        for key, image, label in samples:
            writer.write({"__key__": key, "jpg": image, "cls": label})


def _measure(contenders: dict[str, Work], rounds: int) -> dict[str, list[Cost]]:
    """The cost of every round, by contender; one more goes before, which is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            cost = _cost(contenders[name])
            if turn:
                costs[name].append(cost)
    return costs


def _cost(work: Work) -> Cost:
    with tempfile.TemporaryDirectory() as scratch:
        wall, cpu = time.perf_counter(), _cpu_s()
        work(Path(scratch))
        return Cost(time.perf_counter() - wall, _cpu_s() - cpu)


def _cpu_s() -> float:
    """CPU seconds of this process and of workers that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _row(name: str, costs: dict[str, list[Cost]], setting: Setting) -> dict[str, Any]:
    its, ours = costs[name], next(iter(costs.values()))
    return {
        "images_per_second": statistics.median(setting.images / cost.wall_s for cost in its),
        "cpu_ms_per_image": statistics.median(cost.cpu_s for cost in its) / setting.images * 1000,
        "our_cpu_to_its": _quartiles([a.cpu_s / b.cpu_s for a, b in zip(ours, its, strict=True)]),
        "our_rate_to_its": _quartiles([b.wall_s / a.wall_s for a, b in zip(ours, its, strict=True)]),
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    """[median, lower, upper]"""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return [middle, low, high]


def _print(part: str, rows: dict[str, dict[str, Any]], setting: Setting, size: float) -> None:
    about = f"{setting.rounds} rounds of {setting.images:,} images of {size / 1000:,.0f} kB"
    table = Table(title=f"{part}: {about}; first row to the others")
    for column in ("writer", "images/s", "CPU ms / image", "our CPU to its (quartiles)", "our rate to its"):
        table.add_column(column, justify="left" if column == "writer" else "right")
    for i, (name, row) in enumerate(rows.items()):
        ratios = ["{:.2f} ({:.2f} .. {:.2f})".format(*row[key]) for key in ("our_cpu_to_its", "our_rate_to_its")]
        figures = (f"{row['images_per_second']:,.0f}", f"{row['cpu_ms_per_image']:.3f}")
        table.add_row(name, *figures, *(ratios if i else ["", ""]))
    Console(width=120).print(table)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SkiplaneError as error:
        raise SystemExit(f"error: {error}") from error
