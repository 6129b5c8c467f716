"""Journals that this process sends and others write, or wrote: those of a sweep's trials."""

import threading
import time
from collections.abc import Iterable, Mapping

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal
from orchestrator.tracking.journals import standing
from orchestrator.tracking.records import Shipped, Status, Tags, to_line
from orchestrator.tracking.shipper import Served, shipper
from orchestrator.tracking.tracker import OFF, OFFLINE, Place
from pipelines.remote.url import is_url

FOLDER_S, BUCKET_S = 2.0, 10.0  # between looks for what others have written


class Others:
    """Sends other processes' journals, which are looked at now and then. Raises nothing because a server is away."""

    def __init__(self, uri: str) -> None:
        self._uri = "" if uri in (OFF, OFFLINE) else uri  # empty: nothing is sent
        self._served = dict[str, Served]()
        self._ended = threading.Event()
        self._pause = FOLDER_S
        if self._uri:
            threading.Thread(target=self._look, name="skiplane-others", daemon=True).start()

    def follow(self, storage: Storage) -> None:
        """Sends what is written there, from now on."""
        known = self._served.get(storage.place)
        if self._uri and (known is None or known.records is not None):
            self._pause = BUCKET_S if is_url(storage.place) else FOLDER_S
            self._served[storage.place] = shipper().serve(storage.place, self._uri)

    def complete(self, storage: Storage) -> None:
        """Nothing more is written there."""
        if self._uri:
            if storage.place not in self._served:
                self.follow(storage)
            shipper().close(storage.place, journal.end(storage))

    def end(self, storages: Iterable[Storage], wait_s: float) -> Shipped:
        """Sends all that is left in these, for `wait_s` at most: how far it is then.

        Journals that were followed are taken as they are: who wrote them has ended.
        """
        self._ended.set()
        if not self._uri:
            return Shipped()
        for storage in storages:
            known = self._served.get(storage.place)
            if not (known and known.sent) and standing(storage).waiting:
                self.complete(storage)
        served = [one for one in self._served.values() if one.records is not None]
        shipper().wait(lambda: shipper().away or all(one.failed or one.sent for one in served), wait_s)
        records, shipped = sum(one.records or 0 for one in served), sum(one.next for one in served)
        return Shipped(records, shipped, sum(one.refused for one in served))

    def _look(self) -> None:
        while not self._ended.wait(self._pause):
            for place, served in list(self._served.items()):
                if served.records is None:
                    shipper().kick(place)


def run_id_of(storage: Storage) -> str | None:
    """MLflow's run of a journal; None where it has not been made."""
    known = journal.read_ack(storage)
    return known.run_id if known else None


def add_last(place: Place, status: str, tags: Mapping[str, str]) -> None:
    """Ends a run that nobody has open; one that was never opened has no journal, and gets none."""
    if journal.end(place.storage):
        now = time.time_ns() // 1_000_000
        journal.Writer(place.storage, place.lease).append([to_line(Tags(dict(tags))), to_line(Status(status, now))])


def left_line(shipped: Shipped, place: str, uri: str) -> str:
    """What is still to be sent, or was not taken, for a person."""
    words = []
    if shipped.left:
        words.append(f"{shipped.left:,} of {shipped.records:,} records wait in {place}; this sends them: "
                     f"python -m jobs.tracking sync {place}{' --uri URI' if uri == OFFLINE else ''}")  # fmt: skip
    if shipped.refused:
        words.append(f"{shipped.refused:,} were refused, see {place}/{journal.REFUSED}; this tries them again: "
                     f"python -m jobs.tracking sync {place} --refused")  # fmt: skip
    return f"tracking: {'; '.join(words)}"
