"""Packs a dataset: `python -m jobs.pack digits --out DIR`, or `folder --train DIR --val DIR --out DIR`."""

import argparse
import sys
import time
from pathlib import Path

from jobs import edge
from orchestrator.settings import Parser
from pipelines.pack import pack, packed_alike
from pipelines.sources import Source

SHARD_SAMPLES = {"digits": 180, "folder": 1250}  # digits: eight shards, so that streams and windows exist


def main(argv: list[str]) -> int:
    """Exit codes: 0 packed, 2 setting, 3 data."""
    args = _parser().parse_args(argv)
    out = args.out.expanduser().absolute()
    source = _source(args)
    cut = {"seed": args.seed, "shard_samples": args.shard_samples or SHARD_SAMPLES[args.source]}
    if found := packed_alike(source, out, **cut):
        edge.say(f"{out} is packed already: digest {found.digest[:16]}")
        return 0
    began = time.monotonic()
    with Bar() as bar:
        made = pack(source, out, progress=bar.show, **cut)
    counts = ", ".join(f"{split.samples:,} {name} in {len(split.shards)} shards" for name, split in made.splits.items())
    took = time.monotonic() - began
    edge.say(f"packed {out} in {took:.0f} s: {len(made.classes)} classes, {counts}, digest {made.digest[:16]}")
    return 0


def _source(args: argparse.Namespace) -> Source:
    if args.source == "digits":
        from pipelines.sources.digits import digits  # scikit-learn takes seconds to import

        return digits(args.size, args.seed)
    from pipelines.sources.folder import folder

    return folder(args.train, args.val)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m jobs.pack", description="Packs images into a dataset.", allow_abbrev=False)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE", parser_class=Parser)
    digits = sources.add_parser("digits", help="scikit-learn's handwritten digits as JPEGs")
    digits.add_argument("--size", type=int, default=16, help="side of an image, px")
    folder = sources.add_parser("folder", help="class folders, as torchvision's ImageFolder reads them")
    folder.add_argument("--train", type=Path, required=True, help="training images: one folder a class")
    folder.add_argument("--val", type=Path, required=True, help="validation images, the same classes")
    for each in (digits, folder):
        each.add_argument("--out", type=Path, required=True, help="the dataset's folder")
        each.add_argument("--seed", type=int, default=0, help="of the shuffle (and the digits' split)")
        each.add_argument("--shard-samples", type=int, default=0, help="images a shard")
    return parser


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
