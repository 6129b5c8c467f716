"""The door to MLflow: a run is opened, records are delivered, histories are read. mlflow (1.5 s) is loaded on use."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from orchestrator.state.storage import Storage
from orchestrator.tracking.address import answers, without_password
from orchestrator.tracking.connection import alone, artifacts, connect
from orchestrator.tracking.delivery import METRICS, Delivery, Numbered, log_pairs
from orchestrator.tracking.failures import TIMED_OUT, Denied, Refused, Unreachable, Unstored, told
from orchestrator.tracking.journal import Ack
from orchestrator.tracking.records import DatasetRef, Open
from orchestrator.tracking.refusals import SetAside
from pipelines.errors import ClusterError, ConfigError

ID = "skiplane.id"  # the tag by which a run is found whose id was never heard
PARENT = "mlflow.parentRunId"
LEAST = 100  # points in a request to a server that took too long: sent again, points that it has take it longer still
DIGEST = 36  # characters of a dataset's digest

Point = tuple[int, int, float]  # step, milliseconds, value


class Server:
    """MLflow at one URI. Methods raise Unreachable for what may pass, and ConfigError, a sentence, for what stays."""

    def __init__(self, uri: str) -> None:
        self.uri, self.shown = uri, without_password(uri)
        self._size = METRICS
        try:
            answers(uri)
        except ClusterError as error:
            raise Unreachable(str(error).partition("; ")[0]) from error
        with self._telling("to be used"):
            self.client = connect(uri)

    def open(self, record: Open, parent_run_id: str | None, known: Ack | None) -> tuple[str, str]:
        """(experiment id, run id) of a run that is RUNNING now: the known one, or the one that has the record's id, or
        a new one; experiment and schema are made where they are missing.

        A run that is there gets what it does not have yet, and keeps its name. A parameter of MLflow never changes:
        where one differs, the new value becomes the tag `now.<name>`.
        """
        tags = dict(record.tags) | {ID: record.id} | ({PARENT: parent_run_id} if parent_run_id else {})
        with self._telling(f"run '{record.name}'", opening=True):
            run = self._active(known.run_id) if known else self._found(record)
            if run is None:
                experiment_id = self._experiment(record.experiment)
                run, tags = self.client.create_run(experiment_id, run_name=record.name, tags=tags), {}
            self._complete(run, record, tags)
        return str(run.info.experiment_id), str(run.info.run_id)

    def deliver(self, run_id: str, records: Sequence[Numbered], storage: Storage) -> list[SetAside]:
        """Sends records, no Open among them; a second time does no harm. Returns what will never be taken.

        storage: the run's, where the contents of files and models lie. Raises ConfigError for a run that is gone too.
        """
        delivery = Delivery(self.uri, self.client, run_id, storage, lambda: self._active(run_id), self._size)
        try:
            with self._telling(f"run {run_id}"):
                aside = delivery.send(records)
        except Unreachable as error:
            if TIMED_OUT in str(error) and not isinstance(error, Unstored):
                self._size = max(self._size // 4, LEAST)
            raise
        self._size = min(2 * self._size, METRICS)
        return aside

    def history(self, run_id: str) -> dict[str, list[Point]]:
        """All points of a run, by metric."""
        with self._telling(f"run {run_id}"):
            keys = self._active(run_id).data.metrics
            found = {key: self.client.get_metric_history(run_id, key) for key in keys}
        return {key: [(p.step, p.timestamp, p.value) for p in points] for key, points in found.items()}

    def _active(self, run_id: str) -> Any:
        """The run. Raises ConfigError where it is not there, or was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ConfigError(
                f"MLflow run {run_id} is not at {self.shown}; set tracking.uri to where the run was started, or send "
                f"all of it to this server: python -m jobs.tracking sync FOLDER --again"
            ) from error
        if run.info.lifecycle_stage != "active":
            raise ConfigError(f"MLflow run {run_id} was deleted at {self.shown}; restore it (mlflow runs restore "
                              f"--run-id {run_id}) or take another --name")  # fmt: skip
        return run

    def _experiment(self, name: str) -> str:
        """Its id; made where there is none, as is the database's schema."""
        with alone(self.uri):
            found = self.client.get_experiment_by_name(name) or self._new_experiment(name)
        if found.lifecycle_stage != "active":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise ConfigError(
                f"tracking.experiment '{name}' was deleted at {self.shown}; restore it ({restore}) or name another"
            )
        return str(found.experiment_id)

    def _new_experiment(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_experiment(name, artifact_location=artifacts(self.uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
        return self.client.get_experiment_by_name(name)

    def _found(self, record: Open) -> Any:
        """The run that was made for this record before, where the answer was lost."""
        from mlflow.entities import ViewType

        where = f"tags.`{ID}` = '{record.id}'"
        experiments = [self._experiment(record.experiment)]
        runs = self.client.search_runs(experiments, where, run_view_type=ViewType.ALL, max_results=1)
        return self._active(runs[0].info.run_id) if runs else None

    def _complete(self, run: Any, record: Open, tags: Mapping[str, str]) -> None:
        """Gives a run what it does not have of a record."""
        run_id, old = run.info.run_id, run.data.params
        if run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        last = {key: run.data.tags.get(f"now.{key}", value) for key, value in old.items()}
        now = {f"now.{key}": value for key, value in record.params.items() if last.get(key, value) != value}
        missing = {key: value for key, value in record.params.items() if key not in old}
        log_pairs(self.client, run_id, tags=dict(tags) | now, params=missing)
        if record.dataset is not None and not run.inputs.dataset_inputs:
            self.client.log_inputs(run_id, datasets=[_dataset(record.dataset)])

    @contextmanager
    def _telling(self, what: str, opening: bool = False) -> Iterator[None]:
        """Failures, in sentences without the password. Who may not open a run is told; points wait for a password."""
        try:
            with told():
                yield
        except Unstored as error:
            raise Unstored(f"MLflow at {self.shown} cannot store it now ({self._safe(error)})") from error
        except Denied as error:
            raise (ConfigError if opening else Denied)(
                f"MLflow at {self.shown} wants a user that may do this ({self._safe(error)}); set "
                f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        except Unreachable as error:
            raise Unreachable(f"MLflow at {self.shown} does not answer ({self._safe(error)})") from error
        except Refused as error:
            raise ConfigError(f"MLflow at {self.shown} refuses {what} ({self._safe(error)}); look at tracking.uri and "
                              f"tracking.experiment, or take another --name") from error  # fmt: skip

    def _safe(self, error: Exception) -> str:
        return str(error).replace(self.uri, self.shown)


def _dataset(ref: DatasetRef) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = ref.source.partition("://")[0] if "://" in ref.source else "local"
    entity = Dataset(ref.name, ref.digest[:DIGEST], kind, json.dumps({"uri": ref.source}))
    return DatasetInput(entity, [InputTag("mlflow.data.context", "training")])
