"""What a sweep keeps: `sweep.json`, which sweep it is, and `trials/t001.json`, each trial as it stands.

A trial's object is written whole at its birth, at each report and at its end; with the order that reports carry, all of
them together say what happened, and what the search and the stopping rule knew when.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.state.storage import Storage
from orchestrator.sweep.trial import Trial
from pipelines.errors import DataError

FOLDER = "trials"


@dataclass(frozen=True)
class SweepRecord:
    """sweep.json: which sweep this is."""

    identity: dict[str, Any]  # sweep.config.identity
    settings: dict[str, Any]  # flat, resolved: what all trials have in common
    dataset_digest: str
    mlflow_run_id: str | None = None
    id: str = ""  # finds its run in MLflow again


class Journal:
    """A sweep's records in its storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def record(self) -> SweepRecord | None:
        """None for a new sweep. Raises DataError."""
        return self._read("sweep.json", lambda said: SweepRecord(**said))

    def begin(self, record: SweepRecord) -> None:
        """Writes sweep.json: the name now belongs to this sweep."""
        self._storage.write("sweep.json", json.dumps(asdict(record), indent=1, default=list).encode())

    def trials(self) -> dict[str, Trial]:
        """All trials, in order of birth. Raises DataError."""
        names = sorted(name for name in self._storage.names(FOLDER) if name.endswith(".json"))
        found = [self._read(name, Trial.of) for name in names]
        return {trial.id: trial for trial in sorted((t for t in found if t), key=lambda t: (len(t.id), t.id))}

    def put(self, trial: Trial) -> None:
        """As it stands now."""
        self._storage.write(f"{FOLDER}/{trial.id}.json", json.dumps(trial.to_dict(), indent=1).encode())

    def _read(self, name: str, made: Callable[[dict[str, Any]], Any]) -> Any:
        data = self._storage.read(name)
        try:
            return None if data is None else made(json.loads(data))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self._storage.place}/{name} is damaged, so what the sweep did cannot be known; remove the sweep's "
                f"folder, or use another --name"
            ) from error
