"""What streaming costs, from HTTP and from S3, with a cold and a warm cache, beside webdataset and MosaicML streaming.

    python -m benchmarks.stream --data DIR [--rounds 5] [--quick] [--json FILE]

DIR is a folder of class folders, or a dataset that `jobs.pack` wrote; its images are packed again, over and over, until
there are enough. Servers and everyone who streams are processes of their own on this host; a streamer's begins with an
empty cache, streams an epoch, and then another one, whose shards its cache holds. Everyone takes a turn in each round,
in an order that is turned round after round; ratios are taken within a round. CPU seconds are those of a streamer's
process and of all that it starts (webdataset's curl, worker processes); those of the server are not counted, but it
needs the same cores.

    bytes     encoded samples in one process and no decoding: what streaming itself costs
    images    random crops to 224 px in batches of 64

webdataset has no S3 client of its own: it reads the S3 server's objects by their HTTP URLs, unsigned, which is less
work than the command line tools that its manual pipes from. MosaicML streaming reads its own shards, from S3 and not
from HTTP; where it is not installed it is left out. Only this project's streamer checks what it fetched. moto reads an
object whole for each range of it that is asked for, which no real store does: large shards are slow there for those
who ask for ranges (this project, MosaicML).
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import streamers
from benchmarks.repeated import repeated
from benchmarks.servers import CREDENTIALS, Kind, Server
from benchmarks.streamers import Place, Streamer, Work
from pipelines.dataset import Dataset
from pipelines.errors import ConfigError, SkiplaneError

OURS = "skiplane"
BYTES: dict[str, Streamer] = {
    OURS: partial(streamers.skiplane, decode=False),
    "webdataset": partial(streamers.webdataset_bytes, cached=False),
    "webdataset, cache_dir": partial(streamers.webdataset_bytes, cached=True),
    "MosaicML streaming": streamers.mosaic_bytes,
}
IMAGES: dict[str, Streamer] = {
    OURS: partial(streamers.skiplane, decode=True),
    "webdataset, cache_dir + DALI": streamers.webdataset_dali,
    "webdataset, cache_dir + Pillow": streamers.webdataset_pillow,
    "MosaicML streaming + Pillow": streamers.mosaic_pillow,
}
WORKS = {"bytes": BYTES, "images": IMAGES}
KINDS: tuple[Kind, ...] = ("http", "s3")
CACHES = ("cold", "warm")
IMPORTS = ["benchmarks.streamers", "webdataset", "nvidia.dali.pipeline", "torch.utils.data", "streaming", "boto3"]


@dataclass(frozen=True)
class Setting:
    images: int = 1600
    shard_samples: int = 64
    size: int = 224  # px
    batch: int = 64
    threads: int = 2  # decoding threads, or worker processes
    rounds: int = 5


QUICK = {"images": 32, "shard_samples": 8, "size": 32, "batch": 8, "rounds": 1}


@dataclass(frozen=True)
class Epoch:
    """Of one streamer, its beginnings included."""

    images: int
    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Turn:
    first_batch_s: float
    cold: Epoch
    warm: Epoch
    fetched: float = 0.0  # bytes in both epochs, to those of the tars


Rounds = dict[tuple[str, Kind, str], list[Turn]]  # (work, server, streamer) -> its turn in each round


def main(argv: Sequence[str] | None = None) -> int:
    args, setting = _settings(argv)
    if not shutil.which("curl"):
        raise ConfigError("webdataset reads URLs through curl, which is not in the PATH; install curl")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        root = Path(scratch)
        dataset = repeated(args.data, root / "served", setting.images, setting.shard_samples)
        mosaic = streamers.mosaic_version()
        if mosaic:
            streamers.write_mds(dataset, root / "served" / "mds")
        servers = {kind: stack.enter_context(Server(kind, root / "served")) for kind in KINDS}
        rounds = _measure(servers, dataset, setting, root, bool(mosaic))
    rows = {name: _row(turns, rounds[name[0], name[1], OURS]) for name, turns in rounds.items()}
    _print(rows, dataset, setting, mosaic)
    if args.json:
        result = {"setting": asdict(setting), "mosaicml_streaming": mosaic, "turns": _nested(rows)}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(prog="benchmarks.stream", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="class folders of JPEGs, or a packed dataset")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help=f"small: {QUICK}")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in asdict(Setting()) if getattr(args, name) is not None}
    return args, Setting(**((QUICK if args.quick else {}) | given))


# -- turns -------------------------------------------------------------------------------------------------------------


def _measure(servers: dict[Kind, Server], dataset: Dataset, setting: Setting, root: Path, mosaic: bool) -> Rounds:
    places = {kind: _place(server, dataset, mosaic) for kind, server in servers.items()}
    contenders = [
        (work, kind, name)
        for work, streaming in WORKS.items()
        for kind in KINDS
        for name in streaming
        if places[kind].mds or not name.startswith("MosaicML")
    ]
    rounds: Rounds = {contender: [] for contender in contenders}
    for number in range(-1, setting.rounds):  # the first round warms up, and is not counted
        for work, kind, name in contenders[:: -1 if number % 2 else 1]:
            before = servers[kind].sent
            turn = _turn(WORKS[work][name], places[kind], root, setting)
            if number >= 0:
                fetched = (servers[kind].sent - before) / sum(shard.bytes for shard in dataset.splits["train"].shards)
                rounds[work, kind, name].append(replace(turn, fetched=fetched))
    return rounds


def _place(server: Server, dataset: Dataset, mosaic: bool) -> Place:
    tars = tuple(f"{server.objects}/{shard.name}" for shard in dataset.splits["train"].shards)
    mds = f"{server.url}/mds" if mosaic and server.kind == "s3" else ""  # it knows no HTTP
    return Place(server.url, server.endpoint, tars, mds)


def _turn(streamer: Streamer, place: Place, root: Path, setting: Setting) -> Turn:
    """In a process of its own, which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    work = Work(setting.size, setting.batch, setting.threads)
    with tempfile.TemporaryDirectory(dir=root) as cache, ProcessPoolExecutor(1, context) as process:
        return process.submit(_stream, streamer, place, Path(cache), work).result()


def _stream(streamer: Streamer, place: Place, cache: Path, work: Work) -> Turn:
    os.environ |= CREDENTIALS | {"S3_ENDPOINT_URL": place.endpoint}
    first: list[float] = []
    epochs, began, used = [], time.perf_counter(), _cpu_s()
    for batches in streamer(place, cache, work):
        images = 0
        for count in batches:
            images += count
            first = first or [time.perf_counter() - began]
        ended, total = time.perf_counter(), _cpu_s()
        epochs.append(Epoch(images, ended - began, total - used))
        began, used = time.perf_counter(), _cpu_s()
    cold, warm = epochs
    return Turn(first[0], cold, warm)


def _cpu_s() -> float:
    """CPU seconds so far of this process and of all that it started; of what still runs, in steps of 10 ms."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    running = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(u.ru_utime + u.ru_stime for u in (own, ended)) + sum(sum(times[:4]) for times in running)


# -- words -------------------------------------------------------------------------------------------------------------


def _row(turns: list[Turn], ours: list[Turn]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "first_batch_s": statistics.median(turn.first_batch_s for turn in turns),
        "fetched": statistics.median(turn.fetched for turn in turns),
    }
    for cache in CACHES:
        epochs: list[Epoch] = [getattr(turn, cache) for turn in turns]
        own: list[Epoch] = [getattr(turn, cache) for turn in ours]
        row[cache] = {
            "images_per_second": statistics.median(epoch.images / epoch.wall_s for epoch in epochs),
            "cpu_s_per_1000": statistics.median(epoch.cpu_s / epoch.images * 1000 for epoch in epochs),
            "our_rate_to_its": _spread(
                (a.images / a.wall_s) / (b.images / b.wall_s) for a, b in zip(own, epochs, strict=True)
            ),
            "our_cpu_to_its": _spread(
                (a.cpu_s / a.images) / (b.cpu_s / b.images) for a, b in zip(own, epochs, strict=True)
            ),
        }
    return row


def _spread(values: Iterator[float]) -> dict[str, float]:
    ratios = list(values)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "low": low, "high": high}


def _nested(rows: dict[tuple[str, Kind, str], dict[str, Any]]) -> dict[str, Any]:
    """work -> server -> streamer -> its figures."""
    nested: dict[str, Any] = {}
    for (work, kind, name), row in rows.items():
        nested.setdefault(work, {}).setdefault(kind, {})[name] = row
    return nested


def _print(rows: dict[tuple[str, Kind, str], dict[str, Any]], dataset: Dataset, setting: Setting, mosaic: str) -> None:
    console, shards = Console(width=160), dataset.splits["train"].shards
    of = f"{setting.images} images in {len(shards)} shards, {sum(s.bytes for s in shards) / 1e6:.0f} MB"
    for work in WORKS:
        table = Table(title=f"{work}: {of}, {setting.threads} threads or workers, {setting.rounds} rounds")
        for heading in ("from", "cache", "streamer", "images/s", "CPU s / 1000", "our rate to its", "our CPU to its"):
            table.add_column(heading, justify="left" if heading in ("from", "cache", "streamer") else "right")
        table.add_column("first batch s", justify="right")
        table.add_column("fetched / tars", justify="right")
        for kind in KINDS:
            for cache in CACHES:
                for (_, _, name), row in ((of, row) for of, row in rows.items() if of[:2] == (work, kind)):
                    table.add_row(kind, cache, name, *_cells(row, cache, ours=name == OURS), end_section=False)
            table.add_section()
        console.print(table)
    console.print("images/s: a whole epoch, the cold one from nothing on. fetched: in both epochs together.")
    console.print(f"MosaicML streaming {mosaic}" if mosaic else "MosaicML streaming is not installed: left out")


def _cells(row: dict[str, Any], cache: str, *, ours: bool) -> list[str]:
    epoch = row[cache]
    ratios = [
        "" if ours else f"{r['median']:.2f} ({r['low']:.2f} .. {r['high']:.2f})"
        for r in (epoch["our_rate_to_its"], epoch["our_cpu_to_its"])
    ]
    of_both = [f"{row['first_batch_s']:.2f}", f"{row['fetched']:.2f}"] if cache == "cold" else ["", ""]
    return [f"{epoch['images_per_second']:,.0f}", f"{epoch['cpu_s_per_1000']:.2f}", *ratios, *of_both]


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SkiplaneError as error:
        raise SystemExit(f"error: {error}") from error
