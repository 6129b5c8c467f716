"""One run's way from its journal to the server: in order, at least once, and nothing there is doubled."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, refusals
from orchestrator.tracking.delivery import Numbered
from orchestrator.tracking.failures import Unstored, Waiting
from orchestrator.tracking.journal import Ack, Piece
from orchestrator.tracking.records import File, Model, Open, OtherVersion, from_line
from orchestrator.tracking.refusals import SetAside
from pipelines.errors import DataError

ANSWER_S = 10.0  # of a run's storage
ARTIFACTS_S = 600.0  # for which files and models hold up what comes after them, where they cannot be stored


def storage_of(place: str) -> Storage:
    """Of a run that is sent: trying again is the shipper's work, with its own pauses."""
    return Storage(place, wait_s=0.0, answer_s=ANSWER_S)


class Receiver(Protocol):
    """The server, as far as a shipment needs it: see Server."""

    shown: str

    def open(self, record: Open, parent_run_id: str | None, known: Ack | None) -> tuple[str, str]:
        """(experiment id, run id). Raises Unreachable, or ConfigError."""

    def deliver(self, run_id: str, records: Sequence[Numbered], storage: Storage) -> list[SetAside]:
        """Returns what will never be taken. Raises Unreachable, Unstored where only an artifact is in the way, or
        ConfigError."""


@dataclass(frozen=True)
class Opened:
    """The run is in MLflow, and RUNNING."""

    experiment_id: str
    run_id: str


@dataclass(frozen=True)
class Sent:
    """Records arrived: the number of the next one, how many before it were refused, and which of these just now."""

    next: int
    refused: int
    aside: list[SetAside]


class Shipment:
    """Sends one piece of a journal at a time, and notes in the run's folder how far it has come.

    What was sent and not noted is sent again, by this process or the next one: MLflow drops what it has.
    """

    def __init__(self, storage: Storage, server: Receiver, tell: Callable[[Opened | Sent], None], *,
                 again: bool = False, clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        """Goes on from what was acknowledged, also by another server: a run that moved keeps its id.

        again: begins at the first record, as if nothing had been. Raises ClusterError where the storage fails, as
        `step` does.
        """
        self._storage, self._server, self._tell, self._clock = storage, server, tell, clock
        self._ack = None if again else journal.read_ack(storage)
        self._unstored: float | None = None  # since when artifacts at this position fail

    @property
    def next(self) -> int:
        """Number of the first record that has not been acknowledged."""
        return self._ack.next if self._ack else 0

    @property
    def refused(self) -> int:
        """Records before it that were refused."""
        return self._ack.refused if self._ack else 0

    def step(self, patient: bool = True) -> bool:
        """Opens the run, or sends what comes next, and tells it; False where there is nothing.

        patient: files and models that cannot be stored now hold up the rest, for ARTIFACTS_S; else they are set aside.
        Raises Unreachable where trying again may help, and ConfigError or DataError where nothing after this can be
        sent until somebody has repaired it.
        """
        piece = journal.read(self._storage, self.next, self._ack.lease if self._ack else None)
        if not piece.lines:
            return False
        records, unknown, known_to = self._parsed(piece)
        first = next((record for number, record in records if number == piece.start), None)
        if isinstance(first, Open):
            self._open(first, piece.start + 1, piece.lease)
        elif self._ack is None:
            self._open(self._first_open(), piece.start, piece.lease)
        else:
            end = next((number for number, record in records if isinstance(record, Open)), known_to)
            aside = [line for line in unknown if line.number < end]
            aside += self._deliver(self._ack.run_id, [item for item in records if item[0] < end], patient)
            self._arrived(self._ack, aside, end, piece.lease)
        return True

    def retry(self) -> None:
        """Sends again what was set aside, and keeps what is refused still. Raises as `step` does."""
        if self._ack is None:
            return
        send, stay = refusals.again(self._storage)
        records = [(aside.number, aside.record) for aside in send if not isinstance(aside.record, str)]
        still = stay + self._deliver(self._ack.run_id, records, patient=False)
        still.sort(key=lambda aside: aside.number)
        refusals.replace(self._storage, still)
        self._note(replace(self._ack, refused=len({aside.number for aside in still})))

    def _open(self, record: Open, after: int, lease: int) -> None:
        """Told before it is noted: a process that dies in between opens the run again, and tells it again."""
        parent = self._parent() if record.child else None
        experiment_id, run_id = self._server.open(record, parent, self._ack)
        self._tell(Opened(experiment_id, run_id))
        if self._ack is None:
            refusals.replace(self._storage, [])
        self._note(Ack(self._server.shown, experiment_id, run_id, after, self.refused, lease))

    def _deliver(self, run_id: str, records: list[Numbered], patient: bool) -> list[SetAside]:
        """Files and models last, and alone: where they lie may be out of order while the server answers."""
        heavy = [item for item in records if isinstance(item[1], File | Model)]
        light = [item for item in records if not isinstance(item[1], File | Model)]
        since, self._unstored = self._unstored, None
        aside = self._server.deliver(run_id, light, self._storage) if light else []
        for item in heavy:
            try:
                aside += self._server.deliver(run_id, [item], self._storage)
            except Unstored as error:
                self._unstored = self._clock() if since is None else since
                if patient and self._clock() - self._unstored < ARTIFACTS_S:
                    raise
                aside.append(SetAside(item[0], str(error), item[1]))
        return aside

    def _arrived(self, ack: Ack, aside: list[SetAside], end: int, lease: int) -> None:
        self._unstored = None
        refusals.keep(self._storage, aside)
        refused = ack.refused + len({line.number for line in aside})
        self._note(replace(ack, uri=self._server.shown, next=end, refused=refused, lease=lease))
        self._tell(Sent(end, refused, aside))

    def _note(self, ack: Ack) -> None:
        journal.write_ack(self._storage, ack)
        self._ack = ack

    def _parent(self) -> str:
        """The run of the folder above. Raises Waiting while there is none at this server."""
        above = self._storage.place.rstrip("/").rpartition("/")[0]
        ack = journal.read_ack(storage_of(above))
        if ack is None or ack.uri != self._server.shown:
            raise Waiting(f"the run in {self._storage.place} waits for that in {above}, whose part it is, to be "
                          f"made in MLflow at {self._server.shown}")  # fmt: skip
        return ack.run_id

    def _first_open(self) -> Open:
        """For a journal that lost its beginning with the power: any later submission says what run it is."""
        for _, line in journal.lines(self._storage):
            with contextlib.suppress(DataError):
                if isinstance(record := from_line(line), Open):
                    return record
        raise DataError(f"the tracking journal in {self._storage.place} lost its beginning, so it is not known what "
                        f"run it is of; submit the run again, which writes that anew")  # fmt: skip

    def _parsed(self, piece: Piece) -> tuple[list[Numbered], list[SetAside], int]:
        """Records with their numbers, the lines that are none, and the number of the record after them.

        Raises DataError for a journal of a newer version, once what stands before that has been sent.
        """
        records, unknown = list[Numbered](), list[SetAside]()
        for number, line in enumerate(piece.lines, piece.start):
            try:
                records.append((number, from_line(line)))
            except OtherVersion as error:
                if number > piece.start:
                    return records, unknown, number
                raise DataError(
                    f"record {number:,} of the tracking journal in {self._storage.place}: {error}"
                ) from error
            except DataError as error:
                unknown.append(SetAside(number, str(error), line.decode(errors="replace").rstrip("\n")))
        return records, unknown, piece.next
