"""Seconds from `ray job submit` to the first training step, and where they go.

    python -m benchmarks.startup [--rounds N] [--workers N] [--quick] [--json FILE]

Starts a one-machine cluster of its own (free ports, a temporary $SKIPLANE_HOME, ended afterwards) and submits a short
digits run to it, round after round, with the command a user types. Nothing is measured inside the job: the moments are
those that Ray's job and task tables, the MLflow run and its metrics have anyway. The first round, with whatever is
cold, is shown apart from the others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from jobs import edge
from orchestrator.cluster import local, processes, services
from pipelines.errors import ClusterError
from pipelines.pack import pack
from pipelines.sources.digits import digits

ROOT = Path(__file__).parent.parent
SUBMITTED, FIRST_STEP = "submitted", "first step done"
# Every moment in its order: what happens in the stretch that ends with it.
MOMENTS = {
    SUBMITTED: "",
    "job accepted": "the command starts; working directory zipped and uploaded",
    "driver runs": "Ray's job supervisor starts",
    "Ray joined": "imports; settings, plan and data checked; MLflow asked; the driver connects",
    "run opened": "cluster looked at, lease taken, MLflow run made",
    "group asked": "nodes looked at, preflight",
    "controller runs": "Ray Train's controller: a process and its imports",
    "processes run": "placement; worker processes and their imports",
    "workers entered": "worker context, process group",
    "net built": "code loaded; dataset opened; net, DDP and its throw-away passes",
    "data ready": "DALI loaded, first batch read and decoded",
    FIRST_STEP: "forward, backward, sum, optimiser",
    "Ray left": "the other steps, evaluation, checkpoint; result written",
    "job ended": "tracking's last points; the driver exits, Ray notices",
}
Moments = dict[str, float]  # name -> seconds since 1970


@dataclass(frozen=True)
class Setting:
    """What is submitted, and how often."""

    recipe: str = "digits"
    workers: int = 2
    rounds: int = 4


QUICK: dict[str, Any] = {"recipe": "digits-quick", "rounds": 1}


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 measured, 2 setting, 4 the cluster or a job failed."""
    setting, file = _settings(argv)
    with _cluster() as cluster:
        rounds = []
        for number in range(setting.rounds):
            rounds.append(measure(cluster, setting, f"startup-{number + 1}"))
            seconds = rounds[-1][FIRST_STEP] - rounds[-1][SUBMITTED]
            edge.say(f"round {number + 1} of {setting.rounds}: first step after {seconds:.1f} s")
    load = os.getloadavg()[1]
    _print(rounds, setting, load)
    if file:
        about = {"setting": asdict(setting), "cpus": os.cpu_count(), "load_average_5_min": load}
        parts = [{"at": since_start(moments), "stretch": stretches(moments)} for moments in rounds]
        file.write_text(json.dumps(about | {"what": MOMENTS, "rounds": parts}, indent=2) + "\n")
    return 0


# -- arithmetic --------------------------------------------------------------------------------------------------------


def since_start(moments: Moments) -> dict[str, float]:
    """Seconds from the submission to each moment, in their order."""
    return {name: moments[name] - moments[SUBMITTED] for name in MOMENTS}


def stretches(moments: Moments) -> dict[str, float]:
    """Seconds from each moment's predecessor to it; they add up to the whole."""
    return {name: moments[name] - moments[before] for before, name in pairwise(MOMENTS)}


def first_step(history: Mapping[str, Sequence[Any]]) -> Moments:
    """The moments of the first step, from its three metrics; each point has `step`, `timestamp` (ms) and `value`.

    The loop reports a step when it is done, how long it took with its wait for data, and that wait's share.
    """
    point = {name: min(points, key=lambda point: int(point.step)) for name, points in history.items()}
    took, share = point["perf/step_s"].value, point["perf/data_wait"].value
    done = point["perf/step_s"].timestamp / 1000
    return {"net built": done - took, "data ready": done - took * (1 - share), FIRST_STEP: done}


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextmanager
def _cluster() -> Iterator[local.Cluster]:
    """A cluster with packed digits, and this process's environment set to use it."""
    with tempfile.TemporaryDirectory(prefix="skiplane-startup-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        pack(digits(), home / "data" / "digits", seed=0, shard_samples=180, progress=lambda *_: None)
        try:
            cluster = local.up(home, {name: processes.free_port() for name in local.DEFAULT_PORTS}, edge.say)
            for name in services.FOREIGN:
                os.environ.pop(name, None)
            os.environ |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(local.token_file(home)),
                "RAY_API_SERVER_ADDRESS": cluster.url("ray"),
            }
            yield cluster
        finally:
            local.down(home, edge.say)


def measure(cluster: local.Cluster, setting: Setting, name: str) -> Moments:
    """One submission, from the command to its end. Raises ClusterError with the job's last words."""
    from ray.job_submission import JobSubmissionClient  # reads the token's place when it is imported

    client = JobSubmissionClient(cluster.url("ray"))
    moments = {SUBMITTED: time.time()}
    log = cluster.folder / f"{name}.log"
    with log.open("wb") as output:
        command = subprocess.Popen(_command(setting, name), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            moments["driver runs"] = _driver_runs(client, name, command)
            code = command.wait(timeout=600)
        finally:
            command.kill()
    if code:
        raise ClusterError(f"job {name} failed; its last words:\n{processes.tail(log)}")
    return moments | _from_ray(cluster, client.get_job_info(name)) | _from_mlflow(cluster, name)


def _command(setting: Setting, name: str) -> list[str]:
    """What a user types; a point for every step, so that the first one's is known."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--submission-id", name, "--working-dir", "."]
    train = ["python", "-m", "jobs.train", "--recipe", setting.recipe, "--name", name, "--train.epochs", "1"]
    return [*ray, "--", *train, "--cluster.workers", str(setting.workers), "--tracking.log_steps", "1"]


def _driver_runs(client: Any, name: str, command: subprocess.Popen[bytes]) -> float:
    """When the driver's process was made: only the process itself knows, so it is asked while it lives."""
    while command.poll() is None:
        try:
            driver = client.get_job_info(name).driver_info
            if driver is not None:
                return psutil.Process(int(driver.pid)).create_time()
        except (RuntimeError, psutil.NoSuchProcess):
            pass  # not accepted yet, or over already
        time.sleep(0.5)
    return float("nan")


def _from_ray(cluster: local.Cluster, job: Any) -> Moments:
    """From the job's record and the tables of processes and tasks."""
    from ray.util.state import list_tasks, list_workers

    asked = {"address": cluster.url("ray"), "detail": True, "limit": 10_000}
    tasks = list_tasks(filters=[("job_id", "=", job.job_id)], **asked)
    (driver,) = (w for w in list_workers(**asked) if w.worker_type == "DRIVER" and w.worker_id.startswith(job.job_id))

    def last(task: str, field: str) -> float:
        return max(getattr(t, field) for t in tasks if t.name == task) / 1000

    return {
        "job accepted": job.start_time / 1000,
        "Ray joined": driver.start_time_ms / 1000,
        "group asked": last("TrainController.__init__", "creation_time_ms"),
        "controller runs": last("TrainController.run", "start_time_ms"),
        "processes run": last("RayTrainWorker.__init__", "end_time_ms"),
        "workers entered": last("RayTrainWorker.run_train_fn", "start_time_ms"),
        "Ray left": driver.end_time_ms / 1000,
        "job ended": job.end_time / 1000,
    }


def _from_mlflow(cluster: local.Cluster, name: str) -> Moments:
    from mlflow import MlflowClient

    client = MlflowClient(cluster.url("mlflow"))
    run = json.loads((cluster.home / "runs" / name / "result.json").read_text())["mlflow_run_id"]
    history = {metric: client.get_metric_history(run, metric) for metric in ("perf/step_s", "perf/data_wait")}
    return {"run opened": client.get_run(run).info.start_time / 1000, **first_step(history)}


# -- words -------------------------------------------------------------------------------------------------------------


def _print(rounds: Sequence[Moments], setting: Setting, load: float) -> None:
    """Medians; the first round apart where there are others."""
    warm = rounds[1:] or rounds
    title = f"{setting.recipe}, {setting.workers} workers, {os.cpu_count()} CPUs, load average {load:.1f}"
    table = Table(title=title, caption=f"seconds: median of {len(warm)} (least - most)")
    for heading in ("moment", "at", "took", "spread", "first round", "what went on"):
        table.add_column(heading, justify="left" if heading in ("moment", "what went on") else "right")
    for name in list(MOMENTS)[1:]:
        took, at = [stretches(r)[name] for r in warm], [since_start(r)[name] for r in warm]
        cells = [f"{statistics.median(at):.1f}", f"{statistics.median(took):.1f}", f"{min(took):.1f} - {max(took):.1f}"]
        style = "bold" if name == FIRST_STEP else None
        table.add_row(name, *cells, f"{stretches(rounds[0])[name]:.1f}", MOMENTS[name], style=style)
    Console(width=140).print(table)


def _settings(argv: Sequence[str]) -> tuple[Setting, Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=(__doc__ or "").partition("\n")[0]
    )
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=type(value), help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help=f"short: {QUICK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    given = vars(parser.parse_args(argv))
    file, quick = given.pop("json"), given.pop("quick")
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    setting = Setting(**(QUICK if quick else {}) | chosen)
    for name in ("workers", "rounds"):
        if getattr(setting, name) < 1:
            parser.error(f"--{name} is {getattr(setting, name)}; at least 1 is needed")
    return setting, file


if __name__ == "__main__":
    edge.run(main)
