"""One turn of `benchmarks.tracking`: a way in its process, an outage meanwhile, and what the server has in the end."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.outage import OUTAGES, Server
from benchmarks.reporting import Job, metrics, point
from benchmarks.tracked import OURS, Turn
from benchmarks.trackers import RUN
from orchestrator.cluster import processes
from pipelines.errors import ClusterError

ROOT = Path(__file__).parent.parent
LIMIT_S = 600  # for one turn


def measure(server: Server, job: Job, condition: str, away_s: float) -> Turn:
    """condition: one of OUTAGES, which lasts away_s, or any other.

    Raises ClusterError where the way fails before it has trained, or does not end.
    """
    folder = Path(job.folder)
    times, told = job.times(), folder / "told.json"
    code = _run(job, times, server, condition, away_s)
    found = json.loads(told.read_text()) if told.exists() else {}
    if ("trained" not in found and not job.killed) or "run_id" not in found or (code and job.way == OURS):
        raise ClusterError(f"{job.name} failed; its last words:\n{processes.tail(folder / 'log', 30)}")
    failed = "sent" not in found
    after_s = 0.0 if failed else found["sent"] - found["trained"]
    if job.killed:
        _sync(folder / RUN, server.uri)
    stored = _stored(server.uri, found["run_id"])
    if condition in OUTAGES:  # nothing that it left may be in the next one's way
        server.leave("refused")
        server.come_back("refused")
    return Turn(times, job.bare, job.points, stored, found.get("errors", 0), after_s, failed and not job.killed)


def _run(job: Job, times: Any, server: Server, condition: str, away_s: float) -> int:
    """Its exit code."""
    with Path(job.folder, "log").open("wb") as log:
        command = [sys.executable, "-m", "benchmarks.trackers", job.to_json()]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        if condition in OUTAGES:
            _reach(job.bare + job.steps // 4, times, process)
            server.leave(condition)
            time.sleep(away_s)
            server.come_back(condition)
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{job.name} did not end within {LIMIT_S} s") from error
    finally:
        process.kill()
        process.wait()


def _sync(run: Path, uri: str) -> None:
    """Sends what a driver of ours left, as its user would."""
    if run.exists():
        command = [sys.executable, "-m", "jobs.tracking", "sync", str(run), "--uri", uri]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def _reach(row: int, times: Any, process: "subprocess.Popen[bytes]") -> None:
    """Until the training is so far, or has ended."""
    while not times[row, 0] and process.poll() is None:
        time.sleep(0.01)


def _stored(uri: str, run_id: str) -> dict[str, list[int]]:
    """Each metric of a point -> the steps that the server has of it.

    One that hung may be out of connections to its database for minutes: it still works on what nobody waits for.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client, limit = MlflowClient(uri), time.monotonic() + LIMIT_S
    while True:
        try:
            return {key: [found.step for found in client.get_metric_history(run_id, key)] for key in metrics(point(1))}
        except MlflowException as error:
            if time.monotonic() > limit:
                raise ClusterError(f"MLflow still fails after {LIMIT_S} s: {error}") from error
            time.sleep(1.0)
