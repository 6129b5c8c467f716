"""What is told to a tracker, and the tracker as the rest of Skiplane sees it."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.tracking.views import View

# MLflow's rule (its docs: "Logging metrics"), narrowed to ASCII. A bad name would poison the batch it is sent in.
_NAME = re.compile(r"[A-Za-z0-9_\-. :/]{1,250}")


@dataclass(frozen=True)
class Metric:
    """One point of a curve. `timestamp_ms` is the time of the event: sent again with the same one, it is no double.

    Raises ValueError for a name that MLflow would refuse.
    """

    key: str
    value: float
    step: int
    timestamp_ms: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.key) or posixpath.normpath(self.key) != self.key or self.key.startswith((".", "/")):
            raise ValueError(
                f"metric name '{self.key}': use ASCII letters, digits, '_', '-', '.', ':', spaces and single slashes"
            )


@dataclass(frozen=True)
class Tags:
    """Tags of the run; later values replace earlier ones."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class File:
    """A small file (a figure, a result) by content, to be kept under `name`, which may have folders."""

    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Status:
    """How the run ended: FINISHED, FAILED or KILLED, and when."""

    status: str
    timestamp_ms: int


Record = Metric | Tags | File | Status


@dataclass(frozen=True)
class DatasetRef:
    """The dataset input of a run: name, digest (hex), and where it lies."""

    name: str
    digest: str
    source: str


class Tracker(Protocol):
    """A run being tracked. Only `finish` and `view` wait for anything; none raises because a server is away."""

    run_id: str | None
    url: str | None  # of the run's page; None without a server

    def metrics(self, points: Sequence[Metric]) -> None:
        """Adds points. Of each key, steps up to the highest one seen are left out: a resumed run repeats them."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Sets tags."""

    def note(self, markdown: str) -> None:
        """The description on the run's page (8,000 characters at most); its first three lines are seen unfolded."""

    def file(self, content: bytes, name: str) -> None:
        """Keeps a small file (a figure, a result) under `name`, which may have folders."""

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Shows rows of the same keys, one at least, as a table under `name` (.json), in place of the one before."""

    def view(self, view: View) -> str | None:
        """A link that opens runs of this run's experiment side by side; None without a server."""

    def finish(self, status: str | None, timeout_s: float = 15.0) -> int:
        """Ends the run as FINISHED, FAILED or KILLED, after what waits; returns how many records did not go."""


class NullTracker:
    """The stand-in: hears everything, keeps nothing."""

    run_id: str | None = None
    url: str | None = None

    def metrics(self, points: Sequence[Metric]) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Nothing."""

    def note(self, markdown: str) -> None:
        """Nothing."""

    def file(self, content: bytes, name: str) -> None:
        """Nothing."""

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Nothing."""

    def view(self, view: View) -> str | None:
        """No link."""
        return None

    def finish(self, status: str | None, timeout_s: float = 15.0) -> int:
        """Nothing is left."""
        return 0
