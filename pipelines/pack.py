"""Packing: images -> shuffled WebDataset tars, an index a split, and dataset.json, which makes it a dataset.

Each shard is a task of its own, so that packing is parallel, stops anywhere and goes on, and the bytes are the same
whoever makes them: the order is shuffled once and cut (packing/packing.py), what is done is written down beside the
shards (packing/unfinished.py, packing/target.py), and dataset.json comes last. Or tars of somebody else are adopted:
their index is made (packing/adopting.py).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.dataset import MANIFEST, Dataset, Split, manifest, open_dataset, verify
from pipelines.errors import DataError, SkiplaneError
from pipelines.packing.done import Done
from pipelines.packing.packing import Packing
from pipelines.packing.resize import Resize
from pipelines.packing.run import Here, Run
from pipelines.packing.target import Target
from pipelines.packing.unfinished import Bad, Contents, Job, Unfinished
from pipelines.sources import Progress, Source

LeftOut = dict[str, str]  # split, name, reason
GoingOn = Callable[[int, int], None]  # shards that were done before, in all
HERE = Here(threads=2)
MEASURED = ("left_out", "order_chi2")  # what `made` says of the result, rather than of how it was asked for


def pack(
    source: Source,
    out: Path | str,
    *,
    seed: int,
    shard_samples: int,
    progress: Progress,
    bad: Bad = "refuse",
    resize: Resize | None = None,
    endpoint: str = "",
    run: Run = HERE,
    going_on: GoingOn = lambda *_: None,
) -> Dataset:
    """Packs `source` into the folder or URL `out`, which must not exist or hold nothing but the beginning of this.

    Images that cannot be decoded are listed under `left_out` of what `made` says, or refused. `progress` hears of the
    images that are done with; `going_on`, where an earlier packer was stopped, of shards. For errors see `fulfil`.
    """
    job = Packing(source, seed, shard_samples, resize)
    return fulfil(job, Target(str(out), endpoint), progress, bad=bad, run=run, going_on=going_on)


def fulfil(
    job: Job,
    target: Target,
    progress: Progress,
    *,
    bad: Bad = "refuse",
    run: Run = HERE,
    going_on: GoingOn = lambda *_: None,
) -> Dataset:
    """Does a job, or what is left of it.

    Raises ConfigError where the target is in use or cannot be written, DataError where an image cannot be read or is
    refused, ClusterError where a server or a process fails. What is done by then is kept, and gone on from; where that
    is nothing, nothing is left behind.
    """
    with target.locked():
        unfinished = Unfinished(job, target)
        if unfinished.done:
            going_on(len(unfinished.done), unfinished.total)
        try:
            unfinished.finish(bad, run, progress)
            contents = _contents(job, unfinished)
            _conclude(target, job.made, contents)
        except Hopeless:
            unfinished.discard()
            raise
        except BaseException as error:
            if not unfinished.done:
                unfinished.discard()
            elif isinstance(error, SkiplaneError):
                raise type(error)(f"{error}; {unfinished.kept}") from error
            raise
        target.forget()
    return open_dataset(target.place, target.endpoint)


def packed_alike(
    made: Mapping[str, Any], out: Path | str, *, bad: Bad = "refuse", endpoint: str = ""
) -> Dataset | None:
    """The dataset in `out`, if it was made in this way. Raises DataError where it was, and is no longer whole."""
    target = Target(str(out), endpoint)
    if target.size(MANIFEST) is None or target.begun:
        return None
    found = open_dataset(target.place, endpoint)
    how = {key: value for key, value in found.made.items() if key not in MEASURED}
    if how != json.loads(json.dumps(made)) or (left_out_of(found) and bad == "refuse"):
        return None
    verify(found, "size")
    return found


def left_out_of(dataset: Dataset) -> list[LeftOut]:
    """The images that were left out when a dataset was packed: split, name and reason of each."""
    return list(dataset.made.get("left_out", ()))


class Hopeless(DataError):
    """Going on would end in the same way."""


def _contents(job: Job, unfinished: Unfinished) -> Contents:
    shards = {split: unfinished.shards(split) for split in job.shards}
    for split, dones in shards.items():
        if not any(len(done.records) for done in dones):
            raise Hopeless(f"no image of {split} can be decoded; look at the source")
    try:
        return job.contents(shards)
    except DataError as error:
        raise Hopeless(str(error)) from error


def _conclude(target: Target, made: Mapping[str, Any], contents: Contents) -> None:
    """Indexes, then dataset.json."""
    splits = {name: _split(target, name, shards) for name, shards in contents.shards.items()}
    made = {**made, **contents.measured}
    if left_out := _left_out(contents.shards):
        made["left_out"] = left_out
    document = manifest(contents.classes, splits, made)
    target.write(MANIFEST, (json.dumps(document, indent=1) + "\n").encode())


def _split(target: Target, name: str, shards: Sequence[Done]) -> Split:
    """Writes the index of the shards that have images."""
    good = [done for done in shards if len(done.records)]
    records = np.concatenate([done.records for done in good])
    records["shard"] = np.repeat(np.arange(len(good)), [len(done.records) for done in good])
    data = records.tobytes()
    target.write(f"{name}.index", data)
    return Split(name, tuple(done.shard for done in good), f"{name}.index", hashlib.sha256(data).hexdigest())


def _left_out(shards: Mapping[str, Sequence[Done]]) -> list[LeftOut]:
    left_out = [
        {"split": split, "name": name, "reason": reason}
        for split, dones in shards.items()
        for done in dones
        for name, reason in done.left_out
    ]
    return sorted(left_out, key=lambda one: (one["split"], one["name"]))
