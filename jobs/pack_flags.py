"""The flags of `python -m jobs.pack`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from orchestrator.settings import Parser
from pipelines.errors import ConfigError
from pipelines.packing.resize import Resize
from pipelines.sources.samples import IMAGES, LABELS

Act = Callable[[argparse.Namespace], int]


def parser(pack: Act, verify: Act, info: Act) -> argparse.ArgumentParser:
    """What they parse has the one to call as `act`."""
    made = Parser(prog="python -m jobs.pack", description="Packs images into a dataset.", allow_abbrev=False)
    commands = made.add_subparsers(dest="source", required=True, metavar="COMMAND", parser_class=Parser)
    drawn, *others = _digits(commands), _folder(commands), _zip(commands), _ilsvrc(commands)
    _add_target(_tars(commands), pack)
    for each in (drawn, *others):
        _add_target(each, pack)
        _add_cut(each)
        each.set_defaults(shard_samples=1250)  # 140 MB of ImageNet
    drawn.set_defaults(shard_samples=180)  # eight shards, so that streams and windows exist
    _add_readers(commands, verify, info)
    return made


def resize(args: argparse.Namespace) -> Resize | None:
    """Raises ConfigError for a quality of images that are not stored anew."""
    if args.resize is None:
        if args.quality is not None:
            raise ConfigError(
                f"--quality is {args.quality}, but images keep their bytes without --resize PX; give both"
            )
        return None
    return Resize(args.resize, args.quality or 90)


def _digits(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    drawn = commands.add_parser("digits", help="scikit-learn's handwritten digits as JPEGs")
    drawn.add_argument("--size", type=_whole(1, 65535), default=16, help="side of an image, px")
    return drawn


def _folder(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    folders = commands.add_parser("folder", help="class folders, as torchvision's ImageFolder reads them")
    folders.add_argument("--train", type=Path, required=True, help="training images: one folder a class")
    folders.add_argument("--val", type=Path, required=True, help="validation images, the same classes")
    return folders


def _zip(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    zips = commands.add_parser("zip", help="class folders in a zip")
    zips.add_argument("file", type=Path, metavar="FILE.zip")
    zips.add_argument("--train", default="", metavar="PREFIX", help="training images' folder; default: named train")
    zips.add_argument("--val", default="", metavar="PREFIX", help="validation images'; default: named val or test")
    return zips


def _ilsvrc(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    tars = commands.add_parser("ilsvrc", help="the official ImageNet tars, as they are")
    tars.add_argument("--train", type=Path, required=True, metavar="ILSVRC2012_img_train.tar")
    tars.add_argument("--val", type=Path, required=True, metavar="ILSVRC2012_img_val.tar")
    tars.add_argument("--devkit", type=Path, required=True, metavar="ILSVRC2012_devkit_t12.tar.gz")
    tars.add_argument("--expect", choices=["official", "any"], default="official", help="how many images and classes")
    return tars


def _tars(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    tars = commands.add_parser("tars", help="adopts WebDataset tars where they lie: writes dataset.json and indexes")
    tars.add_argument(
        "--train", nargs="+", required=True, metavar="PATTERN", help="paths, wildcards, URLs, {000000..000127}"
    )
    tars.add_argument("--val", nargs="+", required=True, metavar="PATTERN", help="the same for validation")
    tars.add_argument("--image", type=_list, default=IMAGES, metavar="EXT,EXT", help=f"default: {','.join(IMAGES)}")
    tars.add_argument(
        "--label",
        type=_list,
        default=LABELS,
        metavar="EXT,EXT",
        help=f"default: {','.join(LABELS)}; json:FIELD for another field than label",
    )
    tars.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    return tars


def _add_target(each: Parser, pack: Act) -> None:
    each.set_defaults(act=pack, doing="packing")
    each.add_argument("--out", required=True, help="the dataset's folder, or s3://, gs:// or az:// URL")
    each.add_argument("--bad", choices=["refuse", "skip"], default="refuse", help="images that do not decode")
    _add_workers(each)
    _add_endpoint(each)


def _add_cut(each: Parser) -> None:
    each.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="of the shuffle (and the digits' split)")
    each.add_argument("--shard-samples", type=_whole(1, 2**31 - 1), metavar="N", help="images a shard")
    each.add_argument("--resize", type=_whole(1, 65500), metavar="PX", help="scale larger short sides to this")
    each.add_argument(
        "--quality", type=_whole(1, 100), metavar="Q", help="of the JPEGs that --resize makes; default 90"
    )


def _add_workers(each: Parser) -> None:
    each.add_argument("--workers", type=_whole(1, 65535), metavar="N", help="shards at a time; default: the cores")


def _add_endpoint(each: Parser) -> None:
    each.add_argument("--endpoint", default="", metavar="URL", help="address of an S3-compatible store")


def _list(text: str) -> tuple[str, ...]:
    """Extensions, with or without their dots."""
    found = tuple(part.strip().lstrip(".").lower() if ":" not in part else part.strip() for part in text.split(","))
    if "" in found or any(":" in part and not part.startswith("json:") for part in found):
        raise argparse.ArgumentTypeError(f"it is '{text}'; extensions with commas between are needed, as jpg,png")
    return found


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Reads whole numbers in a range."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"it is '{text}'; a whole number in {least} .. {most} is needed")

    return parse


def _add_readers(commands: "argparse._SubParsersAction[Parser]", verify: Act, info: Act) -> None:
    checks = commands.add_parser("verify", help="checks a dataset's shards by hash")
    checks.set_defaults(act=verify, doing="verifying")
    _add_workers(checks)
    checks.add_argument("--decode", action="store_true", help="also decode every image")
    tells = commands.add_parser("info", help="tells a dataset's classes, counts, bytes and sizes")
    tells.set_defaults(act=info)
    tells.add_argument("--sheet", type=Path, metavar="FILE.png", help="also draw samples")
    for each in (checks, tells):
        each.add_argument("dataset", metavar="DATASET", help="its folder or URL")
        _add_endpoint(each)
