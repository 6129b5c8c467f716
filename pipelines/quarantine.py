"""Bad images: which, why, what is fed in their place, and when there are too many."""

from collections.abc import Callable, Iterator, Sequence
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


def _nobody(_: BadSample) -> None: ...


class Quarantine:
    """Counts the distinct bad samples of one split on this rank; a few are tolerated, a systematic fault is not.

    tell: hears each of them once, in the thread that decodes, the one past the limit too.
    """

    def __init__(self, limit: int, tell: Callable[[BadSample], None] = _nobody) -> None:
        self.limit, self._tell = limit, tell
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self._seen)

    def add(self, bad: BadSample) -> None:
        """Raises DataError when more than `limit` distinct samples are bad."""
        if bad.id not in self._seen:
            self._seen.add(bad.id)
            self._tell(bad)
        if self.count > self.limit:
            raise DataError(
                f"bad image {bad.key} in {bad.shard} ({bad.reason}) is number {self.count}; data.max_bad allows "
                f"{self.limit} in this split: repair the data or raise data.max_bad"
            )


def allowed(share: float, samples: int) -> int:
    """Bad images that a share of a split's samples tolerates: 1e-4 of 1,281,167 are 128, of 1,437 none.

    A millionth of an image is given on top: 0.0003 x 10,000 is 2.9999999999999996 in binary.
    """
    return int(share * samples + 1e-6)


def nearest(place: int, group: Sequence[int]) -> Iterator[int]:
    """The other members of a group, the nearest first; of two as near the earlier one."""
    for other in sorted(range(len(group)), key=lambda i: (abs(i - place), i)):
        if other != place:
            yield group[other]
