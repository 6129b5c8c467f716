"""A run in MLflow, opened by the driver before any worker starts."""

import getpass
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from orchestrator.tracking import tables, views
from orchestrator.tracking.outbox import MemoryOutbox, Outbox
from orchestrator.tracking.records import DatasetRef, File, Metric, Status, Tags, Tracker
from orchestrator.tracking.sender import Sender, log
from orchestrator.tracking.server import Server

NOTE = 8000  # characters of a tag


class MlflowTracker:
    """Records go to an outbox, and from there to MLflow in a thread of their own; see Tracker."""

    def __init__(
        self, server: Server, experiment_id: str, run_id: str, reached: Mapping[str, int], outbox: Outbox
    ) -> None:
        self._server, self._experiment_id, self._outbox = server, experiment_id, outbox
        self._reached, self._tables = dict(reached), dict[str, None]()
        self.run_id: str | None = run_id
        self.url = views.run_url(server.shown, experiment_id, run_id) if server.is_http else None
        self._sender = Sender(outbox, lambda records: server.deliver(run_id, records), f"MLflow at {server.shown}")

    def metrics(self, points: Sequence[Metric]) -> None:
        """Adds points; steps up to the highest one seen are left out, for each key."""
        fresh = [point for point in points if point.step > self._reached.get(point.key, -1)]
        for point in fresh:
            self._reached[point.key] = max(point.step, self._reached.get(point.key, -1))
        self._outbox.put(fresh)

    def tags(self, values: Mapping[str, str]) -> None:
        """Sets tags."""
        self._outbox.put([Tags(dict(values))])

    def note(self, markdown: str) -> None:
        """The description on the run's page."""
        self.tags({"mlflow.note.content": markdown[:NOTE]})

    def file(self, content: bytes, name: str) -> None:
        """Keeps a small file under `name`."""
        self._outbox.put([File(name, content)])

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Shows rows as a table. The page lists the tables of this submission: tables of other names drop out."""
        self._tables[name] = None
        self._outbox.put([File(name, tables.content(rows)), Tags(tables.tag(self._tables))])

    def view(self, view: views.View) -> str | None:
        """A saved view, or the plain link where it cannot be saved."""
        if not self._server.is_http:
            return None
        try:
            key = views.save(self._server.client, self._experiment_id, view)
        except Exception as error:
            log.warning("the view '%s' could not be saved: %s", view.name, error)
            return views.plain_url(self._server.shown, self._experiment_id, view)
        return views.view_url(self._server.shown, self._experiment_id, key)

    def finish(self, status: str | None, timeout_s: float = 15.0) -> int:
        """Ends the run, after what waits to be sent; None leaves it as it is: it is somebody else's now."""
        if status is not None:
            self._outbox.put([Status(status, time.time_ns() // 1_000_000)])
        return self._sender.close(timeout_s)


def open_tracker(uri: str, experiment: str, name: str, *, run_id: str | None = None, parent_id: str | None = None,
                 params: Mapping[str, str], tags: Mapping[str, str], dataset: DatasetRef | None = None,
                 outbox: Outbox | None = None) -> Tracker:  # fmt: skip
    """Opens a run, or goes on with `run_id`; makes schema and experiment where they are missing. For the driver only.

    Going on, a run gets what it does not have yet, all of it after `new_run`; its name stays. A parameter of MLflow
    never changes: where one differs, the new value becomes the tag `now.<name>`.
    Raises ClusterError where the server does not answer (within 10 s) or fails, ConfigError for a URI, run or
    experiment that cannot be used.
    """
    server, tags = Server(uri), _tags(parent_id) | dict(tags)
    if run_id is None:
        experiment_id, reached = server.experiment(experiment), dict[str, int]()
        run_id = server.new_run(experiment_id, name, tags)
        server.describe(run_id, dict(params), dataset)
    else:
        known = server.reopen(run_id)
        experiment_id, old, reached = known.experiment_id, known.params, known.reached
        tags |= {f"now.{k}": v for k, v in params.items() if old.get(k, v) != v}
        missing = {k: v for k, v in params.items() if k not in old}
        server.describe(run_id, missing, None if known.has_dataset else dataset, tags)
    return MlflowTracker(server, experiment_id, run_id, reached, outbox or MemoryOutbox())


def new_run(uri: str, experiment: str, name: str, *, parent_id: str | None, tags: Mapping[str, str]) -> str:
    """Makes a run that waits (SCHEDULED), to be gone on with by `open_tracker`; returns its id.

    Four requests, and one for whether the server is there. Raises as `open_tracker` does.
    """
    server = Server(uri)
    return server.new_run(server.experiment(experiment), name, _tags(parent_id) | dict(tags), status="SCHEDULED")


def end_run(uri: str, run_id: str, status: str, tags: Mapping[str, str]) -> None:
    """Ends a run that nobody has open, as FINISHED, FAILED or KILLED. Raises as `open_tracker` does."""
    Server(uri).end(run_id, status, dict(tags))


def child_runs(uri: str, parent_id: str, tag: str) -> dict[str, str]:
    """{value of `tag`: run id} of a run's children that have the tag, of several the oldest; deleted ones are left out.

    For a driver that died after it made a run and before it noted that. Raises as `open_tracker` does.
    """
    return Server(uri).children(parent_id, tag)


def _tags(parent_id: str | None) -> dict[str, str]:
    """What every run has, and whose child it is."""
    return {"mlflow.source.type": "JOB"} | _user() | ({"mlflow.parentRunId": parent_id} if parent_id else {})


def _user() -> dict[str, str]:
    with suppress(OSError, KeyError):  # a container may know no user
        return {"mlflow.user": getpass.getuser()}
    return {}
