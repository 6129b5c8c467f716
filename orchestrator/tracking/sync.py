"""Sends a journal by hand: what an offline cluster kept, or what was left when a run ended."""

import time
from collections.abc import Callable

from orchestrator.state.lease import lease
from orchestrator.state.storage import Storage
from orchestrator.tracking.failures import Unreachable, Waiting
from orchestrator.tracking.journals import Standing, standing
from orchestrator.tracking.shipment import Opened, Receiver, Sent, Shipment
from pipelines.errors import ClusterError, ConfigError

TRIES, PAUSE_S = 3, 1.0  # in a row: a database may be locked for a moment


def sync(place: str, server: Receiver, say: Callable[[str], None], show: Callable[[int, int], None]) -> Standing:
    """Sends all there is; the run is held meanwhile, so that no driver's process sends at the same time.

    show: (records sent, records there are). Raises ClusterError where a driver lives or the server does not answer,
    ConfigError where the run cannot be opened, or is part of one that has not been.
    """
    storage, name = Storage(place), place.rpartition("/")[2]
    with lease(storage, name, say):
        before = standing(storage)

        def tell(event: Opened | Sent) -> None:
            if isinstance(event, Sent):
                show(event.next, before.records)

        shipment = Shipment(storage, server, tell)
        try:
            while _patiently(shipment.step):
                pass
        except Waiting as error:
            above = place.rpartition("/")[0]
            raise ConfigError(f"{error}; send that first: python -m jobs.tracking sync {above}") from error
        except Unreachable as error:
            now = standing(storage)
            raise ClusterError(f"{error}; {now.waiting:,} of {now.records:,} records in {place} wait; when it answers, "
                               f"run the same command again") from error  # fmt: skip
    return standing(storage)


def _patiently(step: Callable[[], bool]) -> bool:
    for attempt in range(1, TRIES):
        try:
            return step()
        except Waiting:
            raise
        except Unreachable:
            time.sleep(attempt * PAUSE_S)
    return step()
