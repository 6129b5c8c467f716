"""Bad images: which, why, what is fed in their place, and when there are too many."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.errors import DataError


@dataclass(frozen=True)
class BadSample:
    """One image that was not fed."""

    id: int
    shard: str
    key: str
    reason: str
    replaced_by: int  # sample id


class Quarantine:
    """Counts distinct bad samples of one split on this rank; past `limit` the run fails."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._seen: set[int] = set()

    def admit(self, bad: Sequence[BadSample]) -> None:
        """Raises DataError, naming the last one, where there are more than the limit."""
        for sample in bad:
            self._seen.add(sample.id)
            if len(self._seen) > self.limit:
                raise DataError(
                    f"bad image {sample.shard} {sample.key} ({sample.reason}) is number {len(self._seen)}; data.max_bad "
                    f"allows {self.limit} in this split: repair the data or raise data.max_bad"
                )


def replacements(good: Sequence[bool], micro_batch: int) -> list[int]:
    """For each place the place that is fed: itself where it is good, else the nearest good one of its micro-batch.

    The lower of two equally near wins. Zeros would enter BatchNorm. Raises DataError where a micro-batch has none.
    """
    fed = []
    for i, fine in enumerate(good):
        first = i - i % micro_batch
        mates = [j for j in range(first, min(first + micro_batch, len(good))) if good[j]]
        if not fine and not mates:
            raise DataError(f"all {micro_batch} images of a micro-batch are bad; look at the first of them in the log")
        fed.append(i if fine else min(mates, key=lambda j: (abs(j - i), j)))
    return fed
