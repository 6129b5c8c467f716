"""One delivery: some records of a run, put into as few requests as MLflow allows."""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.state.storage import Storage
from orchestrator.tracking.failures import Refused, Unreachable, Unstored, told
from orchestrator.tracking.journal import FILES
from orchestrator.tracking.records import NOTE, RUN_ID, ExperimentTag, File, Model, Points, Record, Status, Tags
from orchestrator.tracking.refusals import SetAside
from pipelines.errors import ConfigError, DataError

METRICS, ITEMS = 1000, 100  # points, and tags or params, in one request, at most

Numbered = tuple[int, Record]
T = TypeVar("T")

log = logging.getLogger("skiplane.tracking")


@dataclass(frozen=True)
class _Part:
    """The least that can be refused: one point, one tag, or a whole record of another kind."""

    number: int
    record: Record


class Delivery:
    """Sends records, none of them an Open; a second time does no harm.

    active: the run as MLflow has it; raises ConfigError where it is gone. Asked once something was refused: it may be
    the run rather than the record. size: points in one request.
    """

    def __init__(self, uri: str, client: Any, run_id: str, storage: Storage, active: Callable[[], Any],
                 size: int = METRICS) -> None:  # fmt: skip
        self._uri, self._client, self._run_id, self._storage, self._active = uri, client, run_id, storage, active
        self._size, self._run = size, None

    def send(self, records: Sequence[Numbered]) -> list[SetAside]:
        """Returns what will never be taken. Files and models come last: where they lie may be out of order.

        Raises Unstored where that is so, and the server itself answers.
        """
        points = [_Part(n, Points(r.step, r.timestamp_ms, {key: value}))
                  for n, r in records if isinstance(r, Points) for key, value in r.values.items()]  # fmt: skip
        tags = [_Part(n, Tags({k: v})) for n, r in records if isinstance(r, Tags) for k, v in r.values.items()]
        refused = self._batches(self._points, points, self._size)
        refused += self._batches(self._tags, tags, ITEMS)
        refused += self._singly(self._experiment_tag, records, ExperimentTag)
        refused += self._singly(self._end, records, Status)
        refused += self._singly(self._storing(self._upload), records, File)
        refused += self._singly(self._storing(self._model), records, Model)  # may take a while: the run has ended
        return [SetAside(part.number, reason, part.record) for part, reason in refused]

    def _singly(self, send: Callable[[Any], None], records: Sequence[Numbered], kind: type) -> list[tuple[_Part, str]]:
        parts = [_Part(number, record) for number, record in records if isinstance(record, kind)]
        return self._batches(lambda part: send(part[0].record), parts, 1)

    def _batches(self, send: Callable[[list[_Part]], None], parts: list[_Part], size: int) -> list[tuple[_Part, str]]:
        """The run is looked at before the culprits are: of a run that is gone every record is refused."""

        def tried(part: list[_Part]) -> None:
            try:
                send(part)
            except Refused:
                self._known()
                raise

        return in_batches(tried, parts, size)

    def _storing(self, send: Callable[[Any], None]) -> Callable[[Any], None]:
        """Asks the server whether it is away itself, where an artifact could not be stored."""

        def tried(record: Any) -> None:
            try:
                send(record)
            except Unreachable as error:
                with told():
                    self._active()
                raise Unstored(str(error)) from error

        return tried

    def _known(self) -> Any:
        if self._run is None:
            with told():
                self._run = self._active()
        return self._run

    def _points(self, parts: Sequence[_Part]) -> None:
        """The same point twice in one request is sent once: MLflow would stumble over two that are NaN."""
        from mlflow.entities import Metric

        records = [part.record for part in parts if isinstance(part.record, Points)]
        found = {(key, repr(value), r.timestamp_ms, r.step): value for r in records for key, value in r.values.items()}
        with told():
            metrics = [Metric(key, value, when, step) for (key, _, when, step), value in found.items()]
            self._client.log_batch(self._run_id, metrics=metrics)

    def _tags(self, parts: Sequence[_Part]) -> None:
        """Later values replace earlier ones."""
        tags = {k: v for part in parts if isinstance(part.record, Tags) for k, v in part.record.values.items()}
        if NOTE in tags:
            tags[NOTE] = tags[NOTE].replace(RUN_ID, self._run_id)
        with told():
            log_pairs(self._client, self._run_id, tags=tags)

    def _experiment_tag(self, tag: ExperimentTag) -> None:
        with told():
            self._client.set_experiment_tag(self._known().info.experiment_id, tag.key, tag.value)

    def _end(self, end: Status) -> None:
        with told():
            self._client.set_terminated(self._run_id, end.status, end_time=end.timestamp_ms)

    def _upload(self, file: File) -> None:
        name, content = Path(file.name), self._storage.read(f"{FILES}/{file.sha256}")
        if content is None or hashlib.sha256(content).hexdigest() != file.sha256:
            state = "is not there" if content is None else "is damaged"
            raise Refused(f"its content {state}: {self._storage.place}/{FILES}/{file.sha256}")
        with told(artifacts=True), tempfile.TemporaryDirectory() as folder:
            local = Path(folder, name.name)
            local.write_bytes(content)
            self._client.log_artifact(self._run_id, str(local), str(name.parent) if name.parent.name else None)

    def _model(self, model: Model) -> None:
        """A checkpoint that is gone or damaged will not come back. torch (2 s) is loaded here, for no other record."""
        from orchestrator.export import export
        from orchestrator.tracking.models import log_model

        try:
            folder, name = model.place
            exported = export(f"{self._storage.place}{folder}", name, log.warning)
            log_model(self._uri, self._run_id, exported, register=model.register, alias=model.alias)
        except (DataError, ConfigError) as error:
            raise Refused(str(error)) from error


def log_pairs(client: Any, run_id: str, tags: Mapping[str, str], params: Mapping[str, str] | None = None) -> None:
    """Tags and params of a run, as many in one request as MLflow allows."""
    from mlflow.entities import Param, RunTag

    parts = [_parts(list(items.items()), ITEMS) for items in (tags, params or {})]
    for some_tags, some_params in zip_longest(*parts, fillvalue=[]):
        pairs = {"tags": [RunTag(k, v) for k, v in some_tags], "params": [Param(k, v) for k, v in some_params]}
        client.log_batch(run_id, **pairs)


def in_batches(send: Callable[[list[T]], None], items: list[T], size: int) -> list[tuple[T, str]]:
    """Sends `items`, `size` at a time; halves what is refused until the culprits are found. Returns them, and why."""
    refused = []
    for part in _parts(items, size):
        try:
            send(part)
        except Refused as error:
            refused += [(part[0], str(error))] if len(part) == 1 else in_batches(send, part, (len(part) + 1) // 2)
    return refused


def _parts(items: list[T], size: int) -> list[list[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)] if items else []
