"""Packs a dataset, verifies it, tells what is in it: `python -m jobs.pack digits --out DIR`, `... verify DIR`."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs import edge
from jobs.bar import Bar
from orchestrator.settings import Parser
from pipelines.checking import check_images
from pipelines.dataset import Dataset, open_dataset, verify
from pipelines.pack import LeftOut, left_out_of, pack, packed_alike
from pipelines.sources import Source

SHARD_SAMPLES = {"digits": 180}  # eight shards, so that streams and windows exist
USUAL_SHARD_SAMPLES = 1250
MOST_SHOWN = 20


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 setting, 3 data."""
    args = _parser().parse_args(argv)
    act: Callable[[argparse.Namespace], int] = args.act
    return act(args)


def _pack(args: argparse.Namespace) -> int:
    out = args.out.expanduser().absolute()
    shard_samples = args.shard_samples or SHARD_SAMPLES.get(args.source, USUAL_SHARD_SAMPLES)
    with Bar() as bar:
        source = _source(args, bar)
        cut = {"seed": args.seed, "shard_samples": shard_samples, "bad": args.bad}
        if found := packed_alike(source, out, **cut):
            edge.say(f"{out} is packed already: digest {found.digest[:16]}")
            return 0
        began = time.monotonic()
        made = pack(source, out, progress=bar.show, threads=_threads(), **cut)
    _say_left_out(left_out_of(made))
    edge.say(f"packed {out} in {time.monotonic() - began:.0f} s: {_contents(made)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
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


def _source(args: argparse.Namespace, bar: Bar) -> Source:
    if args.source == "digits":
        from pipelines.sources.digits import digits  # scikit-learn takes seconds to import

        return digits(args.size, args.seed)
    if args.source == "folder":
        from pipelines.sources.folder import folder

        return folder(args.train, args.val)
    if args.source == "zip":
        from pipelines.sources.zip import zipped

        source = zipped(args.file, args.train, args.val)
        edge.say(f"training images from {source.made['train']}/, validation images from {source.made['val']}/")
        return source
    from pipelines.sources.ilsvrc import ilsvrc

    return ilsvrc(args.train, args.val, args.devkit, args.expect, bar.show_bytes)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m jobs.pack", description="Packs images into a dataset.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="source", required=True, metavar="COMMAND", parser_class=Parser)
    digits = commands.add_parser("digits", help="scikit-learn's handwritten digits as JPEGs")
    digits.add_argument("--size", type=int, default=16, help="side of an image, px")
    folder = commands.add_parser("folder", help="class folders, as torchvision's ImageFolder reads them")
    folder.add_argument("--train", type=Path, required=True, help="training images: one folder a class")
    folder.add_argument("--val", type=Path, required=True, help="validation images, the same classes")
    zipped = commands.add_parser("zip", help="class folders in a zip")
    zipped.add_argument("file", type=Path, metavar="FILE.zip")
    zipped.add_argument("--train", default="", metavar="PREFIX", help="training images' folder; default: named train")
    zipped.add_argument("--val", default="", metavar="PREFIX", help="validation images'; default: named val or test")
    ilsvrc = commands.add_parser("ilsvrc", help="the official ImageNet tars, as they are")
    ilsvrc.add_argument("--train", type=Path, required=True, metavar="ILSVRC2012_img_train.tar")
    ilsvrc.add_argument("--val", type=Path, required=True, metavar="ILSVRC2012_img_val.tar")
    ilsvrc.add_argument("--devkit", type=Path, required=True, metavar="ILSVRC2012_devkit_t12.tar.gz")
    ilsvrc.add_argument("--expect", choices=["official", "any"], default="official", help="how many images and classes")
    for each in (digits, folder, zipped, ilsvrc):
        each.set_defaults(act=_pack)
        each.add_argument("--out", type=Path, required=True, help="the dataset's folder")
        each.add_argument("--seed", type=_natural, default=0, help="of the shuffle (and the digits' split)")
        each.add_argument("--shard-samples", type=_natural, default=0, help="images a shard; 0 = 1250, digits 180")
        each.add_argument("--bad", choices=["refuse", "skip"], default="refuse", help="images that do not decode")
    _add_readers(commands)
    return parser


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"is '{text}'; a whole number, 0 or more, is needed")
    return int(text)


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
