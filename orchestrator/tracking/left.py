"""What drivers have left: runs that nobody has open, and records that the server has not got."""

import time
from collections.abc import Iterable, Mapping

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal
from orchestrator.tracking.journals import standing
from orchestrator.tracking.records import Shipped, Status, Tags, to_line
from orchestrator.tracking.shipper import Served, shipper
from orchestrator.tracking.tracker import OFF, OFFLINE, Place


def add_last(place: Place, uri: str, status: str, tags: Mapping[str, str]) -> None:
    """Ends a run that nobody has open; one that was never opened has no journal, and gets none."""
    if not journal.end(place.storage):
        return
    now = time.time_ns() // 1_000_000
    journal.Writer(place.storage, place.lease).append([to_line(Tags(dict(tags))), to_line(Status(status, now))])
    _send(place.storage, uri)


def send_rest(storages: Iterable[Storage], uri: str, wait_s: float) -> Shipped:
    """Sends what other drivers have left, for `wait_s` at most: how far all of it is then."""
    served = [one for storage in storages if standing(storage).waiting and (one := _send(storage, uri)) is not None]
    if served:
        shipper().wait(lambda: shipper().away or all(one.failed or one.sent for one in served), wait_s)
    records, shipped = sum(one.records or 0 for one in served), sum(one.next for one in served)
    return Shipped(records, shipped, sum(one.refused for one in served))


def left_line(shipped: Shipped, place: str, uri: str) -> str:
    """What is still to be sent, or was not taken, for a person."""
    when, to = ("to send them", " --uri URI") if uri == OFFLINE else ("when the server answers", "")
    words = []
    if shipped.left:
        words.append(f"{shipped.left:,} of {shipped.records:,} records wait in {place}; {when}: "
                     f"python -m jobs.tracking sync {place}{to}")  # fmt: skip
    if shipped.refused:
        words.append(f"{shipped.refused:,} were refused, see {place}/{journal.REFUSED}")
    return f"tracking: {'; '.join(words)}"


def _send(storage: Storage, uri: str) -> Served | None:
    """What is in a journal now, to its end; nothing where nothing is sent."""
    if uri in (OFF, OFFLINE):
        return None
    served = shipper().serve(storage.place, uri)
    shipper().close(storage.place, journal.end(storage))
    return served
