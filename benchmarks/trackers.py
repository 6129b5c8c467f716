"""Ways of tracking a run, each in a process of its own: what `benchmarks.tracking` compares.

    python -m benchmarks.trackers JOB        # as JSON

Those of others are written as their manuals do it. Each opens a run in MLflow, trains, and ends the run. What it tells
lies in `told.json`: run_id; then when it had `trained`, seconds since 1970, and `errors`, how many of its calls raised
meanwhile; in the end when it had `sent` everything.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reporting import Job, metrics, train
from benchmarks.tracked import OURS
from jobs import edge
from orchestrator.config import RunConfig
from orchestrator.context import LocalContext, Record
from orchestrator.plan import OFFICIAL, make_plan
from orchestrator.progress import Ear
from orchestrator.state.register import Register
from orchestrator.state.storage import Storage
from orchestrator.tracking import Place, Tracker, open_tracker

RUN = "run"  # below a job's folder: ours
POLL_S = 0.2  # between two looks of the driver into its mailbox, as in orchestrator/attempts.py
# A request and one more, a second each: an outage of seconds is to these what one of minutes is to MLflow's defaults, 7
# more of 120 s each, with pauses that double from 2 s on.
SHORT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}
BUFFERED = {"MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1"}
Tell = Callable[..., None]


@dataclass(frozen=True)
class Way:
    """`run(job, tell)` trains and tracks."""

    run: Callable[[Job, Tell], None]
    says: str
    environment: dict[str, str] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    job = Job.of_json(argv[0])
    way, told = WAYS[job.way], dict[str, Any]()

    def tell(**values: Any) -> None:
        told.update(values)
        partial = Path(job.folder, "told.partial")
        partial.write_text(json.dumps(told))
        partial.replace(Path(job.folder, "told.json"))

    os.environ.update(way.environment)
    way.run(job, tell)
    return 0


# -- ours --------------------------------------------------------------------------------------------------------------


def _open(job: Job, storage: Storage) -> Tracker:
    place, waits = Place(storage, lease=1), RunConfig().tracking.wait_seconds
    return open_tracker(place, job.uri, "benchmark", job.name, id=uuid.uuid4().hex, params={}, tags={}, wait_s=waits)


@contextmanager
def _driver(job: Job, tell: Tell) -> Iterator[Ear]:
    """What hears records in a driver, with a run of its own."""
    config, storage = RunConfig(), Storage(f"{job.folder}/{RUN}")
    tracker = _open(job, storage)
    tell(run_id=tracker.run_id)
    plan, register = make_plan(config, OFFICIAL["imagenet"]), Register(storage, {}, edge.say)
    yield Ear(config, plan, register, tracker, edge.say, lambda record: None)
    tracker.finish("FINISHED")
    tell(sent=time.time())


def _in_a_worker(job: Job, tell: Tell) -> None:
    """The training thread is that of a worker on Ray Train; the driver drains its mailbox."""
    from orchestrator.cluster.environment import prepare

    prepare(Path(job.folder))
    from orchestrator.cluster.crews import Crews
    from orchestrator.cluster.group import Size
    from orchestrator.cluster.session import session

    with session(cpus=1), Crews(idle_s=0) as crews, _driver(job, tell) as ear:
        group = crews.take(Size(workers=1, cpus=1, gpus=0, timeout_s=60), _work, job, job.name)
        while not (group.done or group.wait(POLL_S)):
            ear.hear(group.hear())
        ear.hear(group.hear())
        tell(trained=time.time(), errors=0 if job.killed else group.outcome()["errors"])
        crews.end(group)


def _work(job: Job, context: Any) -> dict[str, Any]:
    return {"errors": train(job, lambda record: context.send([record]))}


def _in_one_process(job: Job, tell: Tell) -> None:
    """All that the driver does is done on the training thread, too."""
    with _driver(job, tell) as ear:
        context = LocalContext(hear=ear.hear)
        errors = train(job, lambda record: context.send([record]))
        tell(trained=time.time(), errors=errors)


# -- those of others ---------------------------------------------------------------------------------------------------


def _mlflow(job: Job, tell: Tell, *, synchronous: bool) -> None:
    import mlflow

    mlflow.set_tracking_uri(job.uri)
    mlflow.set_experiment("benchmark")
    with mlflow.start_run(run_name=job.name) as run:
        tell(run_id=run.info.run_id)

        def report(record: Record) -> None:
            mlflow.log_metrics(metrics(record), step=record["global_step"], synchronous=synchronous)

        errors = train(job, report)
        tell(trained=time.time(), errors=errors)
        if not synchronous:
            mlflow.flush_async_logging()
    tell(sent=time.time())


def _synchronous(job: Job, tell: Tell) -> None:
    _mlflow(job, tell, synchronous=True)


def _asynchronous(job: Job, tell: Tell) -> None:
    _mlflow(job, tell, synchronous=False)


def _rays_callback(job: Job, tell: Tell) -> None:
    """What Tune's loop does with a report, in the thread that trains: in Tune, too, `report` returns after it, as the
    driver asks a trial for its next result when all callbacks are through with the last."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    callback, trial = MLflowLoggerCallback(tracking_uri=job.uri, experiment_name="benchmark"), _Trial(job.name)
    callback.setup()
    callback.log_trial_start(trial)
    tell(run_id=callback._trial_runs[trial])

    def report(record: Record) -> None:
        callback.log_trial_result(0, trial, metrics(record) | {"training_iteration": record["global_step"]})

    errors = train(job, report)
    tell(trained=time.time(), errors=errors)
    callback.log_trial_end(trial)
    tell(sent=time.time())


@dataclass(frozen=True)
class _Trial:
    """As much of a trial as the callback looks at."""

    name: str
    config: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.name


WAYS = {
    OURS: Way(_in_a_worker, "Context.send in a worker on Ray"),
    "skiplane-local": Way(_in_one_process, "worker and driver on one thread"),
    "mlflow": Way(_synchronous, "mlflow.log_metrics"),
    "mlflow-short": Way(_synchronous, "the same, one retry, 1 s a request", SHORT),
    "async": Way(_asynchronous, "mlflow.log_metrics, synchronous=False"),
    "async-buffered": Way(_asynchronous, "the same, buffered for 1 s", BUFFERED),
    "async-short": Way(_asynchronous, "synchronous=False, one retry, 1 s a request", SHORT),
    "ray-callback": Way(_rays_callback, "MLflowLoggerCallback.log_trial_result"),
}


if __name__ == "__main__":
    edge.run(main)
