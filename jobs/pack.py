"""Packs a dataset: `python -m jobs.pack digits --out DIR`, or `folder --train DIR --val DIR --out DIR`."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs import edge
from orchestrator.settings import Parser
from pipelines.pack import pack, packed_alike
from pipelines.sources import Source, digits
from pipelines.sources.folder import folder


def main(argv: list[str]) -> int:
    """Exit codes: 0 packed, 2 setting, 3 data."""
    args = _parser().parse_args(argv)
    out = args.out.expanduser().absolute()
    cut = {"seed": args.seed, "shard_samples": args.shard_samples}
    made_of, source_of = _source(args)
    if found := packed_alike(made_of, out, **cut):
        edge.say(f"{out} is packed already: digest {found.digest[:16]}")
        return 0
    began = time.monotonic()
    with Bar() as bar:
        made = pack(source_of(), out, progress=bar.show, **cut)
    counts = ", ".join(f"{split.samples:,} {name} in {len(split.shards)} shards" for name, split in made.splits.items())
    took = time.monotonic() - began
    edge.say(f"packed {out} in {took:.0f} s: {len(made.classes)} classes, {counts}, digest {made.digest[:16]}")
    return 0


def _source(args: argparse.Namespace) -> tuple[Mapping[str, Any], Callable[[], Source]]:
    """How the dataset is made, and the images; digits are made only when they are needed."""
    if args.source == "digits":
        return digits.made(args.size, args.seed), lambda: digits.digits(args.size, args.seed)
    source = folder(args.train, args.val)
    return source.made, lambda: source


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m jobs.pack", description="Packs images into a dataset.", allow_abbrev=False)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE", parser_class=Parser)
    drawn = sources.add_parser("digits", help="scikit-learn's handwritten digits as JPEGs")
    drawn.add_argument("--size", type=_positive, default=16, help="side of an image, px")
    folders = sources.add_parser("folder", help="class folders, as torchvision's ImageFolder reads them")
    folders.add_argument("--train", type=Path, required=True, help="training images: one folder a class")
    folders.add_argument("--val", type=Path, required=True, help="validation images, the same classes")
    for each in (drawn, folders):
        each.add_argument("--out", type=Path, required=True, help="the dataset's folder")
        each.add_argument("--seed", type=_seed, default=0, help="of the shuffle (and the digits' split)")
        each.add_argument("--shard-samples", type=_positive, metavar="N", help="images a shard")
    drawn.set_defaults(shard_samples=180)  # eight shards, so that streams and windows exist
    folders.set_defaults(shard_samples=1250)  # 140 MB of ImageNet
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value


def _seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError("it must lie in 0 .. 2**32 - 1")
    return value


class Bar:
    """A progress bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<6}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, disable=not sys.stdout.isatty())
        self._tasks: dict[str, int] = {}
        self._began, self._said = time.monotonic(), time.monotonic()

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, split: str, done: int, total: int) -> None:
        """So many images of a split are written."""
        if split not in self._tasks:
            self._tasks[split] = self._progress.add_task(split, total=total)
        self._progress.update(self._tasks[split], completed=done)  # type: ignore[arg-type]
        if self._progress.disable and time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            rate = done / (self._said - self._began)
            edge.say(f"{split} {done:,} of {total:,} images, {rate:,.0f} a second, {(total - done) / rate:.0f} s left")


if __name__ == "__main__":
    edge.run(main)
