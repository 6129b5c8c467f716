"""Packs a dataset, verifies it, tells what is in it: `python -m jobs.pack digits --out DIR`, `... verify DIR`."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import edge, pack_flags, pack_run
from jobs.bar import Bar
from pipelines.dataset import Dataset, open_dataset, verify
from pipelines.pack import LeftOut, fulfil, left_out_of, packed_alike
from pipelines.packing.adopting import Adopting
from pipelines.packing.labels import describe_order
from pipelines.packing.packing import Packing, made_of
from pipelines.packing.target import Target
from pipelines.packing.unfinished import Job
from pipelines.remote.url import is_url
from pipelines.sources import Source, digits
from pipelines.sources.folder import folder
from pipelines.sources.ilsvrc import ilsvrc
from pipelines.sources.samples import Rule
from pipelines.sources.tars import find_tars, read_classes
from pipelines.sources.zip import zipped

MOST_SHOWN = 20


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 setting, 3 data, 4 a cluster, server or process that failed."""
    args = _parser().parse_args(argv)
    act: Callable[[argparse.Namespace], int] = args.act
    return act(args)


def _parser() -> argparse.ArgumentParser:
    return pack_flags.parser(_pack, _verify, _info)


def _pack(args: argparse.Namespace) -> int:
    target = Target(_place(args.out), args.endpoint)
    with Bar() as bar:
        made, job_of = _job(args, bar)
        if found := packed_alike(made, target.place, bad=args.bad, endpoint=args.endpoint):
            edge.say(f"{target.place} is packed already: digest {found.digest[:16]}")
            return 0
        job, began = job_of(), time.monotonic()
        pack_run.check_absolute(args.out)
        shards = sum(job.shards.values())
        with pack_run.chosen(args, job.few, shards, job.paths, target.folder) as run, _told_if_stopped(target):
            progress = bar.show_bytes if job.adopts else bar.show
            packed = fulfil(job, target, progress, bad=args.bad, run=run, going_on=_say_going_on)
    _say_left_out(left_out_of(packed))
    if job.adopts:
        train, chi2 = packed.splits["train"], packed.made.get("order_chi2")
        edge.say(f"order: {describe_order(chi2, len(packed.classes), len(train.shards))}")
    did = "adopted as" if job.adopts else "packed"
    edge.say(f"{did} {target.place} in {time.monotonic() - began:.0f} s: {_contents(packed)}")
    return 0


def _job(args: argparse.Namespace, bar: Bar) -> tuple[Mapping[str, Any], Callable[[], Job]]:
    """How the dataset is made, and what makes it; digits are made only when they are needed."""
    if args.source == "tars":
        adopting = _tars(args)
        return adopting.made, lambda: adopting
    cut = args.seed, args.shard_samples, pack_flags.resize(args)
    if args.source == "digits":
        made = digits.made(args.size, args.seed)
        return made_of(made, *cut), lambda: Packing(digits.digits(args.size, args.seed), *cut)
    job = Packing(_listed(args, bar), *cut)
    return job.made, lambda: job


def _tars(args: argparse.Namespace) -> Adopting:
    rule = Rule(args.image, args.label, read_classes(args.classes) if args.classes else ())
    out = _place(args.out)
    patterns = {"train": args.train, "val": args.val}
    tars = {split: find_tars(f"--{split}", given, out, args.endpoint) for split, given in patterns.items()}
    edge.say(f"adopting {len(tars['train']):,} training and {len(tars['val']):,} validation tars")
    return Adopting(tars, rule, args.endpoint)


def _listed(args: argparse.Namespace, bar: Bar) -> Source:
    if args.source == "folder":
        return folder(args.train, args.val)
    if args.source == "ilsvrc":
        return ilsvrc(args.train, args.val, args.devkit, args.expect, bar.show_bytes)
    source = zipped(args.file, args.train, args.val)
    edge.say(f"training images from {source.made['train']}/, validation images from {source.made['val']}/")
    return source


@contextmanager
def _told_if_stopped(target: Target) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if target.begun:
            edge.say(f"what is done of {target.place} is kept: the same command goes on")
        raise


def _say_going_on(done: int, total: int) -> None:
    edge.say(f"going on: {done:,} of {total:,} shards are done")


def _verify(args: argparse.Namespace) -> int:
    dataset = open_dataset(_place(args.dataset), args.endpoint)
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    with Bar() as bar:
        if args.decode:
            from pipelines.verifying import FEW, check_images  # imports torch

            few = sum(split.samples for split in dataset.splits.values()) < FEW
            verify(dataset, "size")
            with pack_run.chosen(args, few, len(shards)) as run:
                check_images(dataset, bar.show, run, hashes=True)
        else:
            verify(dataset, "sha256", _bytes_shown(bar, sum(shard.bytes for shard in shards)))
    each = "every shard matches its checksum" + (", every image its own, and decodes" if args.decode else "")
    edge.say(f"{dataset.place} is whole: {each}: {_contents(dataset)}")
    return 0


def _bytes_shown(bar: Bar, total: int) -> Callable[[str, int], None]:
    done = 0

    def show(_: str, size: int) -> None:
        nonlocal done
        done += size
        bar.show_bytes("hashes", done, total)

    return show


def _info(args: argparse.Namespace) -> int:
    from pipelines.survey import describe, sheet

    dataset = open_dataset(_place(args.dataset), args.endpoint)
    edge.say(describe(dataset))
    if args.sheet:
        sheet(dataset, args.sheet)
        edge.say(f"samples     {args.sheet}")
    return 0


def _place(given: str) -> str:
    return given if is_url(given) else str(Path(given).expanduser().absolute())


def _contents(dataset: Dataset) -> str:
    splits = dataset.splits.items()
    counts = ", ".join(f"{split.samples:,} {name} in {len(split.shards)} shards" for name, split in splits)
    return f"{len(dataset.classes)} classes, {counts}, digest {dataset.digest[:16]}"


def _say_left_out(left_out: Sequence[LeftOut]) -> None:
    if left_out:
        edge.say(f"left out {len(left_out)} images that cannot be used (dataset.json lists them all):")
    for one in left_out[:MOST_SHOWN]:
        edge.say(f"  {one['split']}  {one['name']}: {one['reason']}")
    if len(left_out) > MOST_SHOWN:
        edge.say(f"  ... and {len(left_out) - MOST_SHOWN} more")


if __name__ == "__main__":
    edge.run(main)
