"""Sends a journal by hand: what an offline cluster kept, or what was left when a run ended."""

import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.state.lease import lease
from orchestrator.state.storage import Storage
from orchestrator.tracking import journal
from orchestrator.tracking.failures import Unreachable, Waiting
from orchestrator.tracking.journals import Standing, standing
from orchestrator.tracking.shipment import Opened, Receiver, Sent, Shipment
from pipelines.errors import ClusterError, ConfigError

TRIES, PAUSE_S = 3, 1.0  # in a row: a database may be locked for a moment

T = TypeVar("T")


def sync(place: str, server: Receiver, say: Callable[[str], None], show: Callable[[int, int], None], *,
         again: bool = False, refused: bool = False) -> Standing:  # fmt: skip
    """Sends all there is; the run is held meanwhile, so that no driver's process sends at the same time. Files and
    models that cannot be stored are set aside.

    show: (records sent, records there are). again: from the first record on, to a server that has lost them. refused:
    what was set aside is tried again too. Raises ClusterError where a driver lives or the server does not answer,
    ConfigError where the run cannot be opened, or is part of one that has not been.
    """
    storage, name = Storage(place), place.rpartition("/")[2]
    with lease(storage, name, say):
        before = standing(storage)

        def tell(event: Opened | Sent) -> None:
            if isinstance(event, Sent):
                show(event.next, before.records)

        shipment = Shipment(storage, server, tell, again=again)
        try:
            while _patiently(shipment.step):
                pass
            if refused:
                _patiently(lambda _: shipment.retry())
        except Waiting as error:
            above = place.rpartition("/")[0]
            elsewhere = journal.read_ack(Storage(above)) is not None
            anew = f" --again --uri {server.shown}" if elsewhere else ""
            raise ConfigError(f"{error}; send that first: python -m jobs.tracking sync {above}{anew}") from error
        except Unreachable as error:
            now = standing(storage)
            raise ClusterError(f"{error}; {now.waiting:,} of {now.records:,} records in {place} wait; when it answers, "
                               f"run the same command again") from error  # fmt: skip
    return standing(storage)


def _patiently(step: Callable[[bool], T]) -> T:
    """Its argument is whether it is tried again."""
    for attempt in range(1, TRIES):
        try:
            return step(True)
        except Waiting:
            raise
        except Unreachable:
            time.sleep(attempt * PAUSE_S)
    return step(False)
