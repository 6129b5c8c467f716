"""Journals below a folder: a run's, or a study's or sweep's with those of all its runs; and how far each was sent."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, views
from orchestrator.tracking.access import Access
from orchestrator.tracking.address import without_password
from orchestrator.tracking.journal import Ack
from pipelines.errors import ConfigError


@dataclass(frozen=True)
class Standing:
    """How far a journal has been sent."""

    place: str
    records: int
    ack: Ack | None  # None: nothing was sent

    @property
    def shipped(self) -> int:
        """Records that the server has, or has refused."""
        return self.ack.next if self.ack else 0

    @property
    def waiting(self) -> int:
        """Records that are still to be sent."""
        return max(self.records - self.shipped, 0)

    @property
    def refused(self) -> int:
        """Records that the server will never take."""
        return self.ack.refused if self.ack else 0

    @property
    def url(self) -> str:
        """Of the run's page; empty without a server."""
        if self.ack is None or not self.ack.uri.startswith(("http://", "https://")):
            return ""
        return views.run_url(self.ack.uri, self.ack.experiment_id, self.ack.run_id)

    def to_dict(self) -> dict[str, Any]:
        """For scripts."""
        where = {"server": self.ack.uri, "mlflow_run_id": self.ack.run_id} if self.ack else {}
        counts = {"records": self.records, "shipped": self.shipped, "waiting": self.waiting, "refused": self.refused}
        return {"run": self.place, **counts, "server": None, "mlflow_run_id": None, **where, "url": self.url or None}


def standing(storage: Storage) -> Standing:
    """As it is now. Raises ClusterError where the storage fails."""
    return Standing(storage.place, journal.end(storage), journal.read_ack(storage))


def places(folder: str) -> list[str]:
    """The folders at and below this one that have a journal, parents first. Raises ConfigError where none has."""
    folder, found = folder.rstrip("/"), set[str]()
    for name in Storage(folder).names():
        above, inside, _ = f"/{name}".partition(f"/{journal.FOLDER}/")
        if inside:
            found.add(folder + above)
    if not found:
        raise ConfigError(f"FOLDER is {folder}, and there is no tracking journal in it; name the folder of a run, a "
                          f"study or a sweep that was tracked: <cluster.storage>/<name>")  # fmt: skip
    return sorted(found, key=lambda place: (place.count("/"), place))


def address(place: str, asked: str, environment: str) -> str:
    """Where a journal goes: to `asked` if that is said, else where it or its parent went, else to MLFLOW_TRACKING_URI.

    The environment's address is also taken for its password, which is kept nowhere. Raises ConfigError for none, and
    where this shell's password would go to a server that only the folder names: who wrote that is not known.
    """
    acks = [journal.read_ack(Storage(where)) for where in (place, place.rpartition("/")[0])]
    known = next((ack.uri for ack in acks if ack), "")
    if asked or not known:
        found = asked or environment
    else:
        found = environment if without_password(environment) == known else known
        if _server(found) not in (None, _server(environment)) and Access.to(found).secret:
            raise ConfigError(f"the run in {place} went to {known}, and this shell has a user or token for an MLflow "
                              f"server, which is sent to none that only a folder names; if it is for that one, give "
                              f"--uri {known} or set MLFLOW_TRACKING_URI")  # fmt: skip
    if not found:
        raise ConfigError(f"the run in {place} was tracked offline, so it is not known where it goes; give --uri, or "
                          f"set MLFLOW_TRACKING_URI")  # fmt: skip
    return found


def _server(uri: str) -> tuple[str, str | None, int] | None:
    """Scheme, host and port; None for what is no MLflow server."""
    parts = urlsplit(uri)
    ports = {"http": 80, "https": 443}
    return (parts.scheme, parts.hostname, parts.port or ports[parts.scheme]) if parts.scheme in ports else None
