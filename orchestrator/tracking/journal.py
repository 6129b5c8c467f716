"""A run's journal: records in the order in which they came, in small segments below the run's folder.

    tracking/journal/000000000000-000000001.jsonl      number of its first record, lease of the driver that wrote it

A segment belongs to one driver and grows by being put again, whole, so a folder and a bucket are alike and no line is
ever torn; at SEGMENT_BYTES the next one begins. A driver that takes a run over begins a segment at the number after the
last record that it saw: what an older driver, which does not know yet, still adds behind that number does not count.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from orchestrator.state.storage import Storage

FOLDER = "tracking/journal"
FILES = "tracking/files"
SERVER = "tracking/server.json"
REFUSED = "tracking/refused.jsonl"
SEGMENT_BYTES = 256 * 2**10  # about 200 points of the training curves; what one flush writes, at most


@dataclass(frozen=True, order=True)
class Segment:
    """Where a driver's records begin."""

    start: int  # number of its first record
    lease: int

    @property
    def name(self) -> str:
        """Of the object."""
        return f"{FOLDER}/{self.start:012d}-{self.lease:09d}.jsonl"


def segments(names: Sequence[str]) -> list[Segment]:
    """The segments that count, in order: of two that begin alike the newer driver's, and none that an older driver
    began after a newer one."""
    found = (re.fullmatch(rf"{FOLDER}/(\d{{12}})-(\d{{9}})\.jsonl", name) for name in names)
    counted: list[Segment] = []
    for segment in sorted(Segment(int(match[1]), int(match[2])) for match in found if match):
        if counted and segment.lease < counted[-1].lease:
            continue
        if counted and segment.start == counted[-1].start:
            counted.pop()
        counted.append(segment)
    return counted


@dataclass(frozen=True)
class Piece:
    """Records in a row, of one driver."""

    start: int  # number of the first
    lease: int
    lines: list[bytes]

    @property
    def next(self) -> int:
        """Number of the record after them."""
        return self.start + len(self.lines)


def read(storage: Storage, start: int, lease: int | None = None) -> Piece:
    """Records from number `start` on, to the end of one segment; none: no more yet. One listing, one object, or two.

    The first may come after `start`, where power loss took the records between. lease: of the driver whose records
    before `start` were read; where a newer one began below `start`, its records have not been read yet and come first.
    """
    found = segments(storage.names(FOLDER))
    start = min([start, *(s.start for s in found if lease is not None and s.lease > lease)])
    return next(_pieces(storage, found, start), Piece(start, lease or 0, []))


def lines(storage: Storage) -> Iterator[tuple[int, bytes]]:
    """All records there are now: number, line. One listing, and each object once."""
    for piece in _pieces(storage, segments(storage.names(FOLDER)), 0):
        yield from enumerate(piece.lines, piece.start)


def end(storage: Storage) -> int:
    """Records there are: the number of the next one."""
    found = segments(storage.names(FOLDER))
    return found[-1].start + len(_lines(storage, found[-1])) if found else 0


def remove(storage: Storage) -> None:
    """All of it, of a run that never began."""
    for name in storage.names("tracking"):
        storage.remove(name)


def _pieces(storage: Storage, found: Sequence[Segment], start: int) -> Iterator[Piece]:
    """What counts of each segment, from record `start` on."""
    ends = [*(segment.start for segment in found[1:]), None]
    for segment, end in zip(found, ends, strict=False):  # without segments there is an end too many
        if end is None or end > start:
            lines = _lines(storage, segment)[: None if end is None else end - segment.start]
            if rest := lines[max(start - segment.start, 0) :]:
                yield Piece(max(start, segment.start), segment.lease, rest)


def _lines(storage: Storage, segment: Segment) -> list[bytes]:
    """Whole lines; without one that power loss tore."""
    return [line + b"\n" for line in (storage.read(segment.name) or b"").split(b"\n")[:-1]]


class Writer:
    """One driver's end of the journal. Not for two threads."""

    def __init__(self, storage: Storage, lease: int) -> None:
        """lease: rises from driver to driver. Raises ClusterError where the storage fails, as `append` does."""
        self._storage, self._lease = storage, lease
        self.next = end(storage)
        self._segment, self._content = Segment(self.next, lease), b""

    def append(self, lines: Sequence[bytes]) -> None:
        """Puts lines behind the others; all or none of them are there afterwards."""
        if len(self._content) >= SEGMENT_BYTES:
            self._segment, self._content = Segment(self.next, self._lease), b""
        content = self._content + b"".join(lines)
        self._storage.write(self._segment.name, content)
        self._content, self.next = content, self.next + len(lines)


@dataclass(frozen=True)
class Ack:
    """Where the run is in MLflow, and how far the journal has been sent: `tracking/server.json`."""

    uri: str  # without user and password
    experiment_id: str
    run_id: str
    next: int = 0  # number of the first record that has not been acknowledged
    refused: int = 0  # of those before it
    lease: int = 0  # of the driver that wrote the last one before it


def read_ack(storage: Storage) -> Ack | None:
    """What was acknowledged; None where the run has not been made, or what is there is torn: then all is sent again."""
    try:
        return Ack(**json.loads(storage.read(SERVER) or b"null"))
    except (ValueError, TypeError):
        return None


def write_ack(storage: Storage, ack: Ack) -> None:
    """In place of the one before."""
    storage.write(SERVER, json.dumps(asdict(ack)).encode())
