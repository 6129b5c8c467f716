"""Labels of adopted tars: what they are called, and whether the shards are random samples of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pipelines.errors import DataError
from pipelines.sources.samples import is_number

MOST_CLASSES = 1_000_000


def name_classes(labels: Sequence[str], given: Sequence[str] = ()) -> tuple[tuple[str, ...], dict[str, int]]:
    """(names of the classes, the class of each label). Whole numbers are classes as they are, names are sorted.

    given: names of the classes, where they are known; a label is then a name or its number. Raises DataError where
    labels are of both kinds, or too large.
    """
    if given:
        numbers = {label: int(label) for label in labels if is_number(label)}
        return tuple(given), numbers | {name: i for i, name in enumerate(given)}
    whole = [label for label in labels if is_number(label)]
    if not whole:
        classes = tuple(sorted(set(labels)))
        return classes, {name: i for i, name in enumerate(classes)}
    if odd := sorted(set(labels) - set(whole)):
        raise DataError(
            f"labels are whole numbers and names ('{whole[0]}', '{odd[0]}'); choose the members that are labels with "
            "--label, or name the classes with --classes FILE"
        )
    if (most := max(map(int, whole))) >= MOST_CLASSES:
        raise DataError(f"label {most:,} is no class; choose the members that are labels with --label")
    return tuple(map(str, range(most + 1))), {label: int(label) for label in whole}


def order_chi2(shards: Sequence[ArrayLike]) -> float | None:
    """How far shards are from random samples: Pearson's chi^2 of each one's labels against all, a degree of freedom.

    The mean over shards, each divided by what a shuffle gives, (N - n) / (N - 1) for n of N samples: about 1 where they
    were shuffled, whatever the number of shards. None for a single shard or class.
    """
    labels = [np.asarray(shard, np.int64) for shard in shards]
    total = np.bincount(np.concatenate(labels))
    present = np.flatnonzero(total)
    if len(labels) < 2 or len(present) < 2:
        return None
    share, samples = total[present] / total.sum(), total.sum()

    def ratio(shard: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> float:
        expected = share * len(shard)
        found = np.bincount(shard, minlength=len(total))[present]
        chi2 = ((found - expected) ** 2 / expected).sum()
        return float(chi2 / (len(present) - 1) * (samples - 1) / (samples - len(shard)))

    return round(sum(map(ratio, labels)) / len(labels), 3)


def describe_order(chi2: float | None, classes: int, shards: int) -> str:
    """In words. Shuffled is what differs from 1 by less than a half, or four standard deviations more."""
    if chi2 is None:
        return "one shard or class: there is no order among shards"
    said = f"chi^2 of the shards' labels is {chi2:,.2f} a degree of freedom"
    if chi2 < 1.5 + 4 * (2 / max(1, classes - 1) / shards) ** 0.5:
        return f"{said}, about 1 or less: shuffled"
    how = "not well shuffled" if chi2 < 5 else "sorted by class, or nearly"
    return (
        f"{said}, where a shuffle gives 1: {how}; pack the images again with a shuffle, or train with data.window 0 "
        "and data.streams 1"
    )
