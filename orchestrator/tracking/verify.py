"""Whether the server has what the journal says, point by point."""

import contextlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, refusals
from orchestrator.tracking.journals import Standing, standing
from orchestrator.tracking.records import Points, Record, from_line
from orchestrator.tracking.server import Point, Server
from pipelines.errors import DataError

Curves = Mapping[str, Sequence[Point]]
Value = tuple[int, float | str]  # time, value; as MLflow gives them back
KINDS: tuple["Kind", ...] = ("missing", "doubled", "different", "foreign")
Kind = Literal["missing", "doubled", "different", "foreign"]


@dataclass(frozen=True)
class Difference:
    """A point that journal and server do not have alike: (milliseconds, value) of each, None where it has none.

    missing: at the journal alone. different: both have a point at this step, with another time or value. doubled: the
    server, or the journal itself, has one more at a step. foreign: the journal has none at that step.
    """

    kind: Kind
    key: str
    step: int
    journal: Value | None
    server: Value | None

    def __str__(self) -> str:
        told = {"journal": self.journal, "server": self.server}
        values = ", ".join(f"{who} {value[1]} at {value[0]}" for who, value in told.items() if value)
        return f"{self.kind}: {self.key} at step {self.step:,} ({values})"


@dataclass(frozen=True)
class Verdict:
    """What a comparison found. `points` counts those of the journal that the server should have by now."""

    standing: Standing
    points: int
    differences: list[Difference]

    @property
    def agree(self) -> bool:
        """Whether the server has all there is, and nothing else."""
        return not self.differences and not self.standing.waiting

    @property
    def lost(self) -> bool:
        """Whether the server has lost something, which nothing but sending all of it again brings back."""
        return bool(self.counts["missing"] and not self.standing.waiting)

    @property
    def counts(self) -> dict[str, int]:
        """Differences of each kind."""
        found = Counter(difference.kind for difference in self.differences)
        return {kind: found[kind] for kind in KINDS}


def verify(storage: Storage, server: Server | None) -> Verdict:
    """Reads server and journal. The server should have what was acknowledged before it was asked; it may have more of
    the journal, which is sent meanwhile. Without a server the run has not been sent, and there is nothing to compare.

    Raises Unreachable, ConfigError, DataError, ClusterError.
    """
    known = standing(storage)
    found = server.history(known.ack.run_id) if server and known.ack else {}
    refused = curves(aside.record for aside in refusals.kept(storage) if not isinstance(aside.record, str))
    records = list(_records(storage))
    written = _less(curves(record for number, record in records if number < known.shipped), refused)
    coming = curves(record for number, record in records if number >= known.shipped)
    return Verdict(known, sum(map(len, written.values())), compare(written, _without(found, _less(coming, written))))


def compare(written: Curves, found: Curves) -> list[Difference]:
    """Differences by metric and step. What the journal holds twice counts once: the server takes it once; but a step
    of which it holds two unlike points is doubled, whatever the server has.

    NaN equals NaN; infinity comes back from MLflow as the greatest number there is.
    """
    differences = []
    for key in sorted({*written, *found}):
        ours, theirs = _by_step(written.get(key, ())), _by_step(found.get(key, ()))
        for step in sorted({*ours, *theirs}):
            again = list(dict.fromkeys(ours[step]))[1:]
            differences += [Difference("doubled", key, step, value, None) for value in again]
            differences += _at(key, step, set(ours[step]), theirs[step])
    return differences


def _at(key: str, step: int, ours: set[Value], theirs: list[Value]) -> list[Difference]:
    more = list((Counter(theirs) - Counter(ours)).elements())
    lost = sorted(ours - set(theirs), key=str)
    unlike = [Difference("different", key, step, a, b) for a, b in zip(lost, more, strict=False)]
    missing = [Difference("missing", key, step, a, None) for a in lost[len(more) :]]
    kind: Kind = "doubled" if ours else "foreign"
    return unlike + missing + [Difference(kind, key, step, None, b) for b in more[len(lost) :]]


def curves(records: Iterable[Record]) -> dict[str, list[Point]]:
    """The points of a journal, by metric."""
    found = defaultdict[str, list[Point]](list)
    for record in records:
        if isinstance(record, Points):
            for key, value in record.values.items():
                found[key].append((record.step, record.timestamp_ms, value))
    return found


def _records(storage: Storage) -> Iterator[tuple[int, Record]]:
    """With their numbers; without lines that are none: they were set aside."""
    for number, line in journal.lines(storage):
        with contextlib.suppress(DataError):
            yield number, from_line(line)


def _less(written: Curves, refused: Curves) -> dict[str, list[Point]]:
    """Each point once, and none that was refused."""
    gone = {(key, step, *_value(when, value)) for key, points in refused.items() for step, when, value in points}
    found = defaultdict[str, list[Point]](list)
    for key, points in written.items():
        for step, when, value in points:
            named = (key, step, *_value(when, value))
            if named not in gone:
                gone.add(named)
                found[key].append((step, when, value))
    return found


def _without(found: Curves, points: Curves) -> Curves:
    gone = {(key, step, *_value(when, value)) for key, curve in points.items() for step, when, value in curve}
    return {key: [point for point in curve if (key, point[0], *_value(*point[1:])) not in gone]
            for key, curve in found.items()}  # fmt: skip


def _by_step(points: Sequence[Point]) -> defaultdict[int, list[Value]]:
    found = defaultdict[int, list[Value]](list)
    for step, when, value in points:
        found[step].append(_value(when, value))
    return found


def _value(when: int, value: float) -> Value:
    if math.isnan(value):
        return when, "nan"
    return when, math.copysign(min(abs(value), sys.float_info.max), value)
