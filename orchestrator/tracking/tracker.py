"""A run being tracked: records go to its journal, and from there to MLflow, whatever becomes of the server."""

import getpass
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, tables, views
from orchestrator.tracking.address import check, probe, without_password
from orchestrator.tracking.recorder import Recorder
from orchestrator.tracking.records import (
    NOTE,
    DatasetRef,
    ExperimentTag,
    Metric,
    Model,
    NullTracker,
    Open,
    Points,
    Shipped,
    Status,
    Tags,
    Tracker,
    from_line,
)
from orchestrator.tracking.shipper import Served, Shipper, shipper
from pipelines.errors import ClusterError

OFF, OFFLINE = "off", "offline"  # tracking URIs: nothing is kept; a journal is, to be sent later
TAG = 8000  # characters of a tag
OPEN_S = 120.0  # for the first answer: importing MLflow, and making a database's schema, on a busy machine
WRITE_S = 10.0  # for the journal's last words
MODEL_TIMES = 4  # as long as for other records: a large net takes a minute to be traced and uploaded

log = logging.getLogger("skiplane.tracking")


@dataclass(frozen=True)
class Place:
    """Whose journal: its storage, and a number that rises from driver to driver (the lease's)."""

    storage: Storage
    lease: int


class JournalTracker:
    """See Tracker. `sent` is None where this process sends nothing: another one does, or nobody yet."""

    def __init__(self, place: Place, recorder: Recorder, reached: Mapping[str, int],
                 sent: tuple[Shipper, Served] | None, wait_s: float, patient: bool) -> None:  # fmt: skip
        """wait_s: how long `finish` waits while nothing more arrives; patient: even where the server is away."""
        self._storage, self._recorder, self._sent = place.storage, recorder, sent
        self._ack = None if sent else journal.read_ack(place.storage)
        self._reached, self._tables = dict(reached), dict[str, None]()
        self._wait_s, self._patient = wait_s, patient
        self._models = list[Model]()

    @property
    def run_id(self) -> str | None:
        """MLflow's."""
        known = self._sent[1] if self._sent else self._ack
        return known.run_id if known else None

    @property
    def url(self) -> str | None:
        """Of the run's page."""
        linked = self._linked
        return views.run_url(without_password(linked.uri), linked.experiment_id, linked.run_id) if linked else None

    @property
    def _linked(self) -> Any:
        """Where the run is, if there are pages to link to."""
        known = self._sent[1] if self._sent else self._ack
        return known if known and known.run_id and known.uri.startswith(("http://", "https://")) else None

    def metrics(self, points: Sequence[Metric]) -> None:
        """Adds points; steps up to the highest one seen are left out, for each key."""
        fresh = [point for point in points if point.step > self._reached.get(point.key, -1)]
        self._reached |= {point.key: point.step for point in sorted(fresh, key=lambda point: point.step)}
        self._recorder.put(_events(fresh))

    def tags(self, values: Mapping[str, str]) -> None:
        """Sets tags."""
        self._recorder.put([Tags(dict(values))])

    def note(self, markdown: str) -> None:
        """The description on the run's page."""
        self.tags({NOTE: markdown[:TAG]})

    def file(self, content: bytes, name: str) -> None:
        """Keeps a small file under `name`."""
        self._recorder.file(content, name)

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Shows rows as a table. The page lists the tables of this submission: tables of other names drop out."""
        self._tables[name] = None
        self._recorder.file(tables.content(rows), name)
        self.tags(tables.tag(self._tables))

    def model(self, checkpoint: str, register: str = "", alias: str = "") -> None:
        """Keeps a checkpoint as a model, after the run's end: uploading may take a while."""
        self._models.append(Model(checkpoint, register, alias))

    def view(self, view: views.View) -> str | None:
        """A saved view."""
        linked = self._linked
        if linked is None:
            return None
        key, name, value = views.saved(view)
        self._recorder.put([ExperimentTag(name, value)])
        return views.view_url(without_password(linked.uri), linked.experiment_id, key)

    def finish(self, status: str | None) -> Shipped:
        """Ends the run. What is not sent in time goes on being sent for as long as this process lives."""
        if status is not None:
            self._recorder.put([Status(status, time.time_ns() // 1_000_000), *self._models])
        records = self._recorder.records
        if lost := self._recorder.close(WRITE_S):
            log.warning("%d records could not be written to %s, and are lost", lost, self._storage.place)
        if self._sent is None:
            self._ack = journal.read_ack(self._storage)
            return Shipped(records - lost, *((self._ack.next, self._ack.refused) if self._ack else ()))
        sending, served = self._sent
        if status is None:
            sending.forget(self._storage.place)
            return Shipped(records - lost, served.next, served.refused)
        sending.close(self._storage.place, records - lost)
        self._await_end(sending, served, self._patient and status != "KILLED")
        return Shipped(records - lost, served.next, served.refused)

    def _await_end(self, sending: Shipper, served: Served, patient: bool) -> None:
        """Until all is sent, or nothing has arrived for a while. Whoever is one of many, or has little time, does not
        wait for a server that is away. A model is one record that may take long."""
        if patient:
            sending.hurry()

        before = served.next

        def moves() -> bool:
            given_up = served.failed is not None or not (patient or sending.away is None)
            return served.sent or given_up or served.next > before

        while sending.wait(moves, self._wait_s * (MODEL_TIMES if self._at_models(served) else 1)):
            if served.next == before or served.sent:
                return
            before = served.next

    def _at_models(self, served: Served) -> bool:
        return 0 < (served.records or 0) - served.next <= len(self._models)


def open_tracker(place: Place, uri: str, experiment: str, name: str, *, id: str, child: bool = False,
                 params: Mapping[str, str], tags: Mapping[str, str], dataset: DatasetRef | None = None,
                 wait_s: float = 30.0, sends: bool = True) -> Tracker:  # fmt: skip
    """Opens a run, or goes on with the one whose journal lies in `place`. For the driver only.

    sends: whether this process does; else another one sends what is in the journal (left.Others). child: of the run of
    the folder above. id: finds the run in MLflow again where the answer to making it was lost.
    A parameter of MLflow never changes: where one differs, the new value becomes the tag `now.<name>`.

    A new run that is nobody's child needs the server: raises ClusterError where that does not answer, and ConfigError
    for an experiment that cannot be used; nothing is left then. Any other goes on without, and is sent later. Raises
    ConfigError for a run that was deleted.
    """
    if uri == OFF:
        return NullTracker()
    known, before = journal.read_ack(place.storage), journal.end(place.storage)
    reached = _reached(line for _, line in journal.lines(place.storage))
    sending = shipper() if sends and uri != OFFLINE else None
    recorder = Recorder(place.storage, place.lease, lambda: sending.kick(place.storage.place) if sending else None)
    recorder.put([Open(id, experiment, name, dict(params), _user() | dict(tags), dataset, child)])
    if sending is None:
        return JournalTracker(place, recorder, reached, None, wait_s, patient=False)
    served = sending.serve(place.storage.place, uri)
    if known and known.uri == without_password(uri):
        served.experiment_id, served.run_id = known.experiment_id, known.run_id
        served.next, served.refused = known.next, known.refused  # as long as nobody answers
    try:
        if not child:
            _await(sending, served, needed=not before)
    except BaseException:
        recorder.close(WRITE_S)
        sending.forget(place.storage.place)
        if not before:
            journal.remove(place.storage)
        raise
    return JournalTracker(place, recorder, reached, (sending, served), wait_s, patient=not child)


def look_for_server(storage: Storage, uri: str, child: bool = False) -> None:
    """Before anything is written. Raises ConfigError for a URI that cannot be used, and ClusterError where nobody
    answers whom a new run needs."""
    if uri not in (OFF, OFFLINE):
        check(uri)
        if not child and not journal.end(storage):
            probe(uri)


def _await(sending: Shipper, served: Served, needed: bool) -> None:
    """Until the server has the run, or is known to be away."""
    heard = sending.wait(lambda: served.opened or served.failed or sending.away, OPEN_S)
    served.check()
    if needed and not served.opened:
        cause = sending.away or f"MLflow at {without_password(served.uri)} has not answered for {OPEN_S:.0f} s"
        raise ClusterError(f"{cause}; look at the server, or set tracking.uri ('{OFFLINE}' keeps a journal to be sent "
                           f"later, 'off' nothing)")  # fmt: skip
    if not heard:
        log.warning("MLflow has not answered for %.0f s; the run goes on, and is sent later", OPEN_S)


def _reached(lines: Iterable[bytes]) -> dict[str, int]:
    """The last step of each metric."""
    reached = dict[str, int]()
    for line in lines:
        if line.startswith(b'{"kind": "points"'):
            points = from_line(line)
            assert isinstance(points, Points)
            reached |= {key: max(points.step, reached.get(key, -1)) for key in points.values}
    return reached


def _events(points: Sequence[Metric]) -> list[Points]:
    """Points of one step and time are one record."""
    events = dict[tuple[int, int], dict[str, float]]()
    for point in points:
        events.setdefault((point.step, point.timestamp_ms), {})[point.key] = point.value
    return [Points(step, when, values) for (step, when), values in events.items()]


def _user() -> dict[str, str]:
    """What every run has."""
    kind = {"mlflow.source.type": "JOB"}
    with suppress(OSError, KeyError):  # a container may know no user
        return kind | {"mlflow.user": getpass.getuser()}
    return kind
