"""Bad images: which, why, what is fed in their place, and when there are too many."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.errors import DataError

CHECKSUM = "its bytes do not match their checksum"


@dataclass(frozen=True)
class BadSample:
    """An image that was not fed, and the one that was fed in its place."""

    id: int  # row in the index
    shard: str
    key: str
    reason: str
    replaced_by: int  # sample id


class Quarantine:
    """Counts the distinct bad samples of one split on this rank; a few are tolerated, a systematic fault is not."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self._seen)

    def add(self, bad: BadSample) -> None:
        """Raises DataError when more than `limit` distinct samples are bad."""
        self._seen.add(bad.id)
        if self.count > self.limit:
            raise DataError(
                f"bad image {bad.key} in {bad.shard} ({bad.reason}) is number {self.count}; data.max_bad allows "
                f"{self.limit} in this split: repair the data or raise data.max_bad"
            )


def nearest(place: int, group: Sequence[int]) -> Iterator[int]:
    """The other members of a group, the nearest first; of two as near the earlier one."""
    for other in sorted(range(len(group)), key=lambda i: (abs(i - place), i)):
        if other != place:
            yield group[other]
