"""The door to MLflow: every call to it, and what its failures mean. mlflow (1.5 s to import) is loaded on first use."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from orchestrator.tracking.address import answers, without_password
from orchestrator.tracking.connection import alone, artifacts, connect
from orchestrator.tracking.records import DatasetRef, File, Metric, Record, Status, Tags
from orchestrator.tracking.sender import Refused, Unreachable
from pipelines.errors import ClusterError, ConfigError

ITEMS = 100  # tags or params in one request
PAGE = 1000  # runs in one answer
DIGEST = 36  # characters of a dataset's digest
# Trying again cannot help: the request itself is wrong, or what it is about is gone.
PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE")


@dataclass(frozen=True)
class Known:
    """What a run that is gone on with has already."""

    experiment_id: str
    params: dict[str, str]
    reached: dict[str, int]  # the last step of each of its metrics
    has_dataset: bool


class Server:
    """MLflow at one URI. While a run is opened, methods raise ClusterError or ConfigError; later, `deliver` raises
    Unreachable or Refused."""

    def __init__(self, uri: str) -> None:
        self.uri, self.shown = uri, without_password(uri)
        answers(uri)
        with self._opening():
            self.client = connect(uri)

    @property
    def is_http(self) -> bool:
        """Whether there is a server with pages to link to."""
        return self.uri.startswith(("http://", "https://"))

    def experiment(self, name: str) -> str:
        """The experiment's id; made where there is none, as is the database's schema."""
        with self._opening(), alone(self.uri):
            found = self.client.get_experiment_by_name(name)
            if found is None:
                return self._new_experiment(name)
        if found.lifecycle_stage != "active":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise ConfigError(
                f"tracking.experiment '{name}' was deleted at {self.shown}; restore it ({restore}) or name another"
            )
        return str(found.experiment_id)

    def _new_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.create_experiment(name, artifact_location=artifacts(self.uri)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self.client.get_experiment_by_name(name).experiment_id)  # another driver was faster

    def new_run(self, experiment_id: str, name: str, tags: dict[str, str], status: str = "RUNNING") -> str:
        """A new run's id. MLflow makes every run RUNNING; another status takes a second request."""
        with self._opening():
            run_id = str(self.client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
            if status != "RUNNING":
                self.client.update_run(run_id, status=status)
        return run_id

    def reopen(self, run_id: str) -> Known:
        """Sets an existing run RUNNING; returns what it has."""
        with self._opening(missing=self._missing(run_id)):
            run = self._active(run_id)
            steps = {key: max(m.step for m in self.client.get_metric_history(run_id, key)) for key in run.data.metrics}
            self.client.update_run(run_id, status="RUNNING")
        return Known(str(run.info.experiment_id), dict(run.data.params), steps, bool(run.inputs.dataset_inputs))

    def end(self, run_id: str, status: str, tags: dict[str, str]) -> None:
        """Tags, then the end of a run, whatever it was before."""
        with self._opening(missing=self._missing(run_id)):
            self._log(run_id, tags=tags)
            self.client.set_terminated(run_id, status)

    def children(self, parent_id: str, tag: str) -> dict[str, str]:
        """{value of the tag: run id} of a run's children, of several the oldest."""
        where, found, page = f"tags.`mlflow.parentRunId` = '{parent_id}'", dict[str, str](), None
        with self._opening(missing=self._missing(parent_id)):
            experiment_id = self._active(parent_id).info.experiment_id
            while page != "":
                runs = self.client.search_runs([experiment_id], where, max_results=PAGE, page_token=page)
                found |= {run.data.tags[tag]: run.info.run_id for run in runs if tag in run.data.tags}  # newest first
                page = runs.token or ""
        return found

    def _active(self, run_id: str) -> Any:
        """The run. Raises ConfigError where it was deleted."""
        run = self.client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            raise ConfigError(f"MLflow run {run_id} was deleted at {self.shown}; restore it (mlflow runs restore "
                              f"--run-id {run_id}) or take another --name")  # fmt: skip
        return run

    def _missing(self, run_id: str) -> str:
        return f"run {run_id} is not at {self.shown}; set tracking.uri to where the run was started"

    def describe(self, run_id: str, params: dict[str, str], dataset: DatasetRef | None,
                 tags: dict[str, str] | None = None) -> None:  # fmt: skip
        """Params, tags and dataset input of a run."""
        with self._opening():
            self._log(run_id, params=params, tags=tags)
            if dataset is not None:
                self.client.log_inputs(run_id, datasets=[_dataset(dataset)])

    def deliver(self, run_id: str, records: Sequence[Record]) -> None:
        """Sends records; a second time does no harm. Raises Unreachable, or Refused with what will never be taken."""
        points = [r for r in records if isinstance(r, Metric)]
        tags = [pair for r in records if isinstance(r, Tags) for pair in r.values.items()]
        refused = in_batches(lambda part: self._send(run_id, metrics=_points(part)), points, len(points))
        refused += in_batches(lambda part: self._send(run_id, tags=dict(part)), tags, ITEMS)
        for record in records:
            if isinstance(record, File):
                refused += in_batches(lambda part: self._upload(run_id, part[0]), [record], 1)
            if isinstance(record, Status):
                refused += in_batches(lambda part: self._terminate(run_id, part[0]), [record], 1)
        if refused:
            raise Refused("; ".join(refused))

    def _send(self, run_id: str, **items: Any) -> None:
        with _sending():
            self._log(run_id, **items)

    def _terminate(self, run_id: str, end: Status) -> None:
        with _sending():
            self.client.set_terminated(run_id, end.status, end_time=end.timestamp_ms)

    def _upload(self, run_id: str, file: File) -> None:
        """Artifacts may lie elsewhere than the server, so a failure of theirs must not hold up what comes after."""
        name = Path(file.name)
        with _sending(artifacts=True), tempfile.TemporaryDirectory() as folder:
            local = Path(folder, name.name)
            local.write_bytes(file.content)
            self.client.log_artifact(run_id, str(local), str(name.parent) if name.parent.name else None)

    def _log(self, run_id: str, metrics: Sequence[Any] = (), tags: dict[str, str] | None = None,
             params: dict[str, str] | None = None) -> None:  # fmt: skip
        from mlflow.entities import Param, RunTag

        if metrics:
            self.client.log_batch(run_id, metrics=metrics)
        parts = [_parts(list((items or {}).items())) for items in (tags, params)]
        for some_tags, some_params in zip_longest(*parts, fillvalue=[]):
            pairs = {"tags": [RunTag(k, v) for k, v in some_tags], "params": [Param(k, v) for k, v in some_params]}
            self.client.log_batch(run_id, **pairs)

    @contextlib.contextmanager
    def _opening(self, missing: str = "") -> Iterator[None]:
        """Failures while a run is opened are the user's to know, in a sentence without the password."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            if missing and isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise ConfigError(f"MLflow {missing}") from error
            cause = str(error).split("\n")[0].replace(self.uri, self.shown)[:300]
            raise ClusterError(
                f"MLflow at {self.shown} fails: {cause}; look at the server, or set tracking.uri"
            ) from error


def in_batches(send: Callable[[list[Any]], None], items: list[Any], size: int) -> list[str]:
    """Sends `items`, `size` at a time; halves what is refused until the culprits are found. Returns why they were."""
    refused = []
    for part in _parts(items, size):
        try:
            send(part)
        except Refused as error:
            refused += [str(error)] if len(part) == 1 else in_batches(send, part, (len(part) + 1) // 2)
    return refused


def _parts(items: list[Any], size: int = ITEMS) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)] if items else []


def _points(metrics: list[Metric]) -> list[Any]:
    from mlflow.entities import Metric as Point

    return [Point(m.key, m.value, m.timestamp_ms, m.step) for m in metrics]


def _dataset(ref: DatasetRef) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = ref.source.partition("://")[0] if "://" in ref.source else "local"
    entity = Dataset(ref.name, ref.digest[:DIGEST], kind, json.dumps({"uri": ref.source}))
    return DatasetInput(entity, [InputTag("mlflow.data.context", "training")])


@contextlib.contextmanager
def _sending(artifacts: bool = False) -> Iterator[None]:
    """Sorts MLflow's failures into those that pass and those that stay."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise (Refused if error.error_code in PERMANENT else Unreachable)(_line(error)) from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Unreachable(_line(error)) from error
    except Exception as error:
        raise (Refused if artifacts else Unreachable)(_line(error)) from error


def _line(error: Exception) -> str:
    """What an error says, short: requests wraps a refused connection in three layers of its own words."""
    text = str(error)
    for telling in ("Connection refused", "Read timed out", "Connection reset", "Name or service not known"):
        if telling in text:
            return telling.lower()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
