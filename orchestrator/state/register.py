"""Which images of a run are bad: each once, over workers, restarts and submissions; and when there are too many."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.state.storage import Storage
from pipelines.errors import DataError

NAME = "bad_images.json"
REPAIR = "repair the data (python -m jobs.pack verify DATASET --decode finds what is damaged)"


@dataclass(frozen=True)
class BadImage:
    """An image that could not be fed, as `result.json` names it."""

    split: str
    id: int  # row in the split's index
    shard: str  # as dataset.json names it
    key: str
    reason: str
    replaced_by: int  # sample id that was fed in its place when it was found

    def __str__(self) -> str:
        return f"{self.shard} {self.key} ({self.reason}), replaced by sample {self.replaced_by}"


class Register:
    """The distinct bad images of a run. It lives in the run's storage, so it counts over submissions of a name too.

    limits: split -> bad images that are tolerated. A file that is damaged is said and begun anew: what it held is
    found again where it is still bad. Raises ClusterError where the storage fails.
    """

    def __init__(self, storage: Storage, limits: Mapping[str, int], say: Callable[[str], None]) -> None:
        self._storage, self._limits = storage, limits
        self.place = f"{storage.place}/{NAME}"
        try:
            self._images = _parsed(storage.read(NAME))
        except (ValueError, TypeError):
            say(f"{self.place} is damaged: the bad images found before are forgotten, and counted anew when met again")
            self._images = {}

    @property
    def images(self) -> tuple[BadImage, ...]:
        """All of them, in the order in which they were found."""
        return tuple(self._images.values())

    def add(self, images: Iterable[BadImage]) -> list[BadImage]:
        """Those that are new, which the storage has before this returns."""
        fresh = []
        for image in images:
            if (image.split, image.id) not in self._images:
                self._images[image.split, image.id] = image
                fresh.append(image)
        if fresh:
            self._storage.write(NAME, json.dumps(self.to_list(), indent=1).encode())
        return fresh

    def check(self, met: Sequence[BadImage]) -> None:
        """Raises DataError where a split of the images just met has more bad ones than it may have.

        Only what is met can fail a run: data that were repaired since do not.
        """
        counts = Counter(split for split, _ in self._images)
        for image in reversed(met):
            count, limit = counts[image.split], self._limits[image.split]
            if count > limit:
                raise DataError(
                    f"bad images in {image.split}: {count}, data.max_bad allows {limit}; the last: {image.key} in "
                    f"{image.shard} ({image.reason}); {REPAIR} and remove {self.place}, or raise data.max_bad"
                )

    def to_list(self) -> list[dict[str, Any]]:
        """For result.json, and for the file."""
        return [asdict(image) for image in self.images]


def _parsed(data: bytes | None) -> dict[tuple[str, int], BadImage]:
    known = [] if data is None else [BadImage(**entry) for entry in json.loads(data)]
    return {(image.split, image.id): image for image in known}
