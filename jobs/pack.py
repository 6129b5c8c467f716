"""Packs a dataset, verifies it, tells what is in it: `python -m jobs.pack digits --out DIR`, `... verify DIR`."""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import edge
from jobs.bar import Bar
from orchestrator.settings import Parser
from pipelines.dataset import Dataset, open_dataset, verify
from pipelines.pack import LeftOut, left_out_of, pack, packed_alike
from pipelines.sources import Source, digits
from pipelines.sources.folder import folder
from pipelines.sources.ilsvrc import ilsvrc
from pipelines.sources.zip import zipped

MOST_SHOWN = 20


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 setting, 3 data."""
    args = _parser().parse_args(argv)
    act: Callable[[argparse.Namespace], int] = args.act
    return act(args)


def _pack(args: argparse.Namespace) -> int:
    out = args.out.expanduser().absolute()
    cut = {"seed": args.seed, "shard_samples": args.shard_samples, "bad": args.bad}
    with Bar() as bar:
        made_of, source_of = _source(args, bar)
        if found := packed_alike(made_of, out, **cut):
            edge.say(f"{out} is packed already: digest {found.digest[:16]}")
            return 0
        began = time.monotonic()
        made = pack(source_of(), out, progress=bar.show, threads=_threads(), **cut)
    _say_left_out(left_out_of(made))
    edge.say(f"packed {out} in {time.monotonic() - began:.0f} s: {_contents(made)}")
    return 0


def _source(args: argparse.Namespace, bar: Bar) -> tuple[Mapping[str, Any], Callable[[], Source]]:
    """How the dataset is made, and the images; digits are made only when they are needed."""
    if args.source == "digits":
        return digits.made(args.size, args.seed), lambda: digits.digits(args.size, args.seed)
    source = _listed(args, bar)
    return source.made, lambda: source


def _listed(args: argparse.Namespace, bar: Bar) -> Source:
    if args.source == "folder":
        return folder(args.train, args.val)
    if args.source == "ilsvrc":
        return ilsvrc(args.train, args.val, args.devkit, args.expect, bar.show_bytes)
    source = zipped(args.file, args.train, args.val)
    edge.say(f"training images from {source.made['train']}/, validation images from {source.made['val']}/")
    return source


def _verify(args: argparse.Namespace) -> int:
    from pipelines.checking import check_images

    dataset = open_dataset(args.dataset.expanduser().absolute())
    total = sum(shard.bytes for split in dataset.splits.values() for shard in split.shards)
    done = 0

    with Bar() as bar:

        def hashed(shard: str, size: int) -> None:
            nonlocal done
            done += size
            bar.show_bytes("hashes", done, total)

        verify(dataset, "sha256", hashed)
        if args.decode:
            check_images(dataset, bar.show, _threads())
    each = "every shard matches its checksum" + (", every image its own, and decodes" if args.decode else "")
    edge.say(f"{dataset.root} is whole: {each}: {_contents(dataset)}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from pipelines.survey import describe, sheet

    dataset = open_dataset(args.dataset.expanduser().absolute())
    edge.say(describe(dataset))
    if args.sheet:
        sheet(dataset, args.sheet)
        edge.say(f"samples     {args.sheet}")
    return 0


def _contents(dataset: Dataset) -> str:
    splits = dataset.splits.items()
    counts = ", ".join(f"{split.samples:,} {name} in {len(split.shards)} shards" for name, split in splits)
    return f"{len(dataset.classes)} classes, {counts}, digest {dataset.digest[:16]}"


def _say_left_out(left_out: Sequence[LeftOut]) -> None:
    if left_out:
        edge.say(f"left out {len(left_out)} images that cannot be decoded (dataset.json lists them all):")
    for one in left_out[:MOST_SHOWN]:
        edge.say(f"  {one['split']}  {one['name']}: {one['reason']}")
    if len(left_out) > MOST_SHOWN:
        edge.say(f"  ... and {len(left_out) - MOST_SHOWN} more")


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m jobs.pack", description="Packs images into a dataset.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="source", required=True, metavar="COMMAND", parser_class=Parser)
    _add_sources(commands)
    _add_readers(commands)
    return parser


def _add_sources(commands: "argparse._SubParsersAction[Parser]") -> None:
    drawn = commands.add_parser("digits", help="scikit-learn's handwritten digits as JPEGs")
    drawn.add_argument("--size", type=_whole(1, 65535), default=16, help="side of an image, px")
    folders = commands.add_parser("folder", help="class folders, as torchvision's ImageFolder reads them")
    folders.add_argument("--train", type=Path, required=True, help="training images: one folder a class")
    folders.add_argument("--val", type=Path, required=True, help="validation images, the same classes")
    zips = commands.add_parser("zip", help="class folders in a zip")
    zips.add_argument("file", type=Path, metavar="FILE.zip")
    zips.add_argument("--train", default="", metavar="PREFIX", help="training images' folder; default: named train")
    zips.add_argument("--val", default="", metavar="PREFIX", help="validation images'; default: named val or test")
    tars = commands.add_parser("ilsvrc", help="the official ImageNet tars, as they are")
    tars.add_argument("--train", type=Path, required=True, metavar="ILSVRC2012_img_train.tar")
    tars.add_argument("--val", type=Path, required=True, metavar="ILSVRC2012_img_val.tar")
    tars.add_argument("--devkit", type=Path, required=True, metavar="ILSVRC2012_devkit_t12.tar.gz")
    tars.add_argument("--expect", choices=["official", "any"], default="official", help="how many images and classes")
    for each in (drawn, folders, zips, tars):
        each.add_argument("--out", type=Path, required=True, help="the dataset's folder")
        each.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="of the shuffle (and the digits' split)")
        each.add_argument("--shard-samples", type=_whole(1, 2**31 - 1), metavar="N", help="images a shard")
        each.add_argument("--bad", choices=["refuse", "skip"], default="refuse", help="images that do not decode")
        each.set_defaults(act=_pack, shard_samples=1250)  # 140 MB of ImageNet
    drawn.set_defaults(shard_samples=180)  # eight shards, so that streams and windows exist


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Reads whole numbers in a range."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"it is '{text}'; a whole number in {least} .. {most} is needed")

    return parse


def _add_readers(commands: "argparse._SubParsersAction[Parser]") -> None:
    checks = commands.add_parser("verify", help="checks a dataset's shards by hash")
    checks.set_defaults(act=_verify)
    checks.add_argument("--decode", action="store_true", help="also decode every image")
    info = commands.add_parser("info", help="tells a dataset's classes, counts, bytes and sizes")
    info.set_defaults(act=_info)
    info.add_argument("--sheet", type=Path, metavar="FILE.png", help="also draw samples")
    for each in (checks, info):
        each.add_argument("dataset", type=Path, metavar="DATASET", help="its folder")


if __name__ == "__main__":
    edge.run(main)
