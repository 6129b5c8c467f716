"""What is told to a tracker, as lines of the journal; and the tracker as the rest of Skiplane sees it."""

import json
import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from orchestrator.tracking.views import View
from pipelines.errors import DataError

# MLflow's rule (its docs: "Logging metrics"), narrowed to ASCII. A bad name would poison the batch it is sent in.
_NAME = re.compile(r"[A-Za-z0-9_\-. :/]{1,250}")

NOTE = "mlflow.note.content"  # the tag that is the description on a run's page
RUN_ID = "{run_id}"  # in there: MLflow's id of the run, for addresses; the driver may not know it yet


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
class DatasetRef:
    """The dataset input of a run: name, digest (hex), and where it lies."""

    name: str
    digest: str
    source: str


@dataclass(frozen=True)
class Open:
    """A submission begins: the run is made, or taken up again; a run is found again by its `id`.

    child: its parent is the run of the folder above.
    """

    id: str
    experiment: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    dataset: DatasetRef | None = None
    child: bool = False


@dataclass(frozen=True)
class Points:
    """The metrics of one event: name -> value."""

    step: int
    timestamp_ms: int
    values: Mapping[str, float]

    @property
    def metrics(self) -> list[Metric]:
        """One point of each curve."""
        return [Metric(key, value, self.step, self.timestamp_ms) for key, value in self.values.items()]


@dataclass(frozen=True)
class Tags:
    """Tags of the run; later values replace earlier ones. RUN_ID in the description is filled in when it is sent."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class File:
    """A small file (a figure, a result), to be kept under `name`, which may have folders; its content lies apart."""

    name: str
    sha256: str


@dataclass(frozen=True)
class ExperimentTag:
    """A tag of the run's experiment: a saved view."""

    key: str
    value: str = field(repr=False)


@dataclass(frozen=True)
class Status:
    """How the run ended: FINISHED, FAILED or KILLED, and when."""

    status: str
    timestamp_ms: int


@dataclass(frozen=True)
class Model:
    """A checkpoint below the run's folder, to be kept as a model; `register` and `alias` as MLflow has them.

    checkpoint: the run's own, or that of a part of it: t003/checkpoints/step-000132.
    """

    checkpoint: str
    register: str = ""
    alias: str = ""

    @property
    def place(self) -> tuple[str, str]:
        """(folder below the run's that has it: "" or "/t003", checkpoint)."""
        head, _, tail = self.checkpoint.rpartition("checkpoints/")
        return (f"/{head.rstrip('/')}" if head else "", f"checkpoints/{tail}")


Record = Open | Points | Tags | File | ExperimentTag | Status | Model
KINDS: dict[str, type[Record]] = {
    "open": Open,
    "points": Points,
    "tags": Tags,
    "file": File,
    "experiment_tag": ExperimentTag,
    "status": Status,
    "model": Model,
}
_KIND = {kind: name for name, kind in KINDS.items()}


def to_line(record: Record) -> bytes:
    """A record as one line of strict JSON: NaN and infinities, which JSON lacks, are strings."""
    said = asdict(record)
    if isinstance(record, Points):
        said["values"] = {k: v if math.isfinite(v) else str(v) for k, v in record.values.items()}
    return json.dumps({"kind": _KIND[type(record)], **said}, allow_nan=False).encode() + b"\n"


class OtherVersion(DataError):
    """A record of a kind that this version of Skiplane does not know: a newer one wrote the journal."""


def from_line(line: bytes) -> Record:
    """The record of a line. Raises OtherVersion for one of another version, DataError for what is none."""
    try:
        said = json.loads(line)
        name = said.pop("kind")
        if name not in KINDS:
            raise OtherVersion(f"'{name}' is no record of a tracking journal that this version of Skiplane knows; use "
                               f"the version that wrote it")  # fmt: skip
        kind = KINDS[name]
        if kind is Points:
            said["values"] = {key: float(value) for key, value in said["values"].items()}
        if kind is Open and said["dataset"]:
            said["dataset"] = DatasetRef(**said["dataset"])
        return kind(**said)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"'{line[:80]!r}' is no record of a tracking journal that this version of Skiplane knows; use "
                        f"the version that wrote it") from error  # fmt: skip


class Tracker(Protocol):
    """A run being tracked. Only `finish` waits for anything; nothing is raised because a server is away."""

    @property
    def run_id(self) -> str | None:
        """MLflow's; None where there is no server, or it has not made the run yet."""

    @property
    def url(self) -> str | None:
        """Of the run's page; None without a server."""

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

    def model(self, checkpoint: str, register: str = "", alias: str = "") -> None:
        """Keeps a checkpoint of the run, named below its folder, as a model."""

    def view(self, view: View) -> str | None:
        """A link that opens runs of this run's experiment side by side; None without a server."""

    def finish(self, status: str | None) -> "Shipped":
        """Ends the run as FINISHED, FAILED or KILLED, after what waits; None leaves it as it is, somebody else's now.

        Waits a bounded time for what has not been sent.
        """


@dataclass(frozen=True)
class Shipped:
    """How far a journal has been sent: records in it, those that the server has, and those that it will never take.

    `records` is 0 without a journal.
    """

    records: int = 0
    shipped: int = 0
    refused: int = 0

    @property
    def left(self) -> int:
        """Records that wait."""
        return self.records - self.shipped


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

    def model(self, checkpoint: str, register: str = "", alias: str = "") -> None:
        """Nothing."""

    def view(self, view: View) -> str | None:
        """No link."""
        return None

    def finish(self, status: str | None) -> Shipped:
        """Nothing is left."""
        return Shipped()
