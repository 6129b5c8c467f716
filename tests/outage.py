"""One tracked run through all that can go wrong between it and its MLflow server; every point is there once at the end.

    python -m tests.outage --server postgres --auth --seconds 60

A driver (a process without Ray) puts points all the time. Meanwhile the server is killed; the driver is killed while it
is away, and another one takes the run over some steps back, as from a checkpoint; the server comes back; the process
that sends is killed; the server hangs. What has to be there is known without the journal: `value` at every step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.state.storage import Storage
from orchestrator.tracking import Metric, Place, journal, open_tracker
from orchestrator.tracking.records import Points, from_line
from tests.mlflow_servers import ADMIN, PASSWORD, Database, MlflowServer, Postgres, sqlite

KEYS = ("train/loss", "train/top1", "train/lr", "val/top1", "perf/step_s")
PARAMS = {f"optim.setting_{i}": str(i) for i in range(60)}  # about as many as a run has
STEP_S = 0.02
BACK = 40  # steps before the last one in the journal at which a driver that takes over begins
WAIT_S = 90.0  # for what is to happen after an outage
Say = Callable[[str], None]


def value(key: str, step: int) -> float:
    """Of a curve at a step."""
    return KEYS.index(key) + 1 / (1 + step)


def curve(key: str, steps: int) -> list[tuple[int, float]]:
    """All of it: (step, value)."""
    return [(step, value(key, step)) for step in range(steps)]


@dataclass(frozen=True)
class Told:
    """What a run's server has at the end. points: (step, value) by metric, in the server's order."""

    steps: int
    points: dict[str, list[tuple[int, float]]]
    status: str
    params: dict[str, str]
    files: list[str]
    runs: int  # in the experiment
    shipped: dict[str, int]  # what the last driver heard: see tracking.Shipped
    put_us: list[float]  # one call, in the driver, microseconds


# -- the driver --------------------------------------------------------------------------------------------------------


def drive(place: str, uri: str, lease: int) -> None:
    """Puts points until a line comes on stdin, then ends the run; says on stdout when it is open, and what it heard."""
    storage, taken = Storage(place), []
    first = max(last_step(storage) - BACK, 0)
    tracker = open_tracker(
        Place(storage, lease), uri, "outage", "run", id="0" * 32, params=PARAMS, tags={}, wait_s=60.0
    )
    print("open", flush=True)
    os.set_blocking(0, False)
    step = first
    while not sys.stdin.readline():
        now = time.time_ns()
        points = [Metric(key, value(key, step), step, now // 10**6) for key in KEYS]
        began = time.perf_counter()
        tracker.metrics(points)
        taken.append((time.perf_counter() - began) * 1e6)
        if step % 100 == 0:
            tracker.file(f"{step}".encode(), "figures/newest.txt")
        step += 1
        time.sleep(STEP_S)
    shipped = tracker.finish("FINISHED")
    print(json.dumps({"steps": step, "shipped": vars(shipped), "put_us": taken}), flush=True)


def last_step(storage: Storage) -> int:
    """The highest one in a journal; -1 without."""
    records = (from_line(line) for _, line in journal.lines(storage))
    return max((record.step for record in records if isinstance(record, Points)), default=-1)


class Driver:
    """A driver in a process of its own."""

    def __init__(self, place: Path, server: MlflowServer, lease: int, log: Path) -> None:
        command = [sys.executable, "-m", "tests.outage", "--drive", str(place), server.uri, str(lease)]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, env=os.environ | server.client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self._heard("open", log)

    def _heard(self, expected: str, log: Path) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line.startswith(expected), f"the driver said {line!r}; {log.read_text()[-2000:]}"
        return line

    @property
    def shipper(self) -> psutil.Process:
        """The process that sends, for now."""
        children = psutil.Process(self._process.pid).children()
        (found,) = [child for child in children if "orchestrator.tracking.shipping" in child.cmdline()]
        return found

    def kill(self) -> None:
        """SIGKILL; also one that has ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def finish(self, log: Path) -> dict:
        """Ends the run; returns what the driver heard."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"finish\n")
        self._process.stdin.close()
        said = json.loads(self._heard("{", log))
        assert self._process.wait() == 0, log.read_text()[-2000:]
        return said


# -- the story ---------------------------------------------------------------------------------------------------------


def story(server: MlflowServer, folder: Path, away_s: float, hangs_s: float, say: Say = lambda _: None) -> Told:
    """All of it against a server that is up."""
    place, log = folder / "run", folder / "driver.log"
    storage = Storage(str(place))
    with ExitStack() as ends:
        driver = Driver(place, server, 1, log)
        ends.callback(driver.kill)
        arrive(storage, 200, "the first points")
        say("the server is killed")
        server.kill()
        grow(storage, 100)
        time.sleep(away_s)
        say("the driver is killed, and another one takes over")
        orphan = driver.shipper
        driver.kill()
        driver = Driver(place, server, 2, log)
        ends.callback(driver.kill)
        grow(storage, 100)
        assert not orphan.is_running(), "what sent for the killed driver still runs"
        say(f"{behind(storage)} records wait; the server is started")
        server.start()
        arrive(storage, journal.end(storage), "what waited for the server")
        say("the process that sends is killed")
        driver.shipper.kill()
        arrive(storage, journal.end(storage), "what waited for another process that sends")
        say("the server hangs")
        with server.frozen():
            time.sleep(hangs_s)
        say(f"{behind(storage)} records wait; the server goes on, and the run ends")
        told = driver.finish(log)
    say(verify(server, place).strip())
    return look(server, **told)


def behind(storage: Storage) -> int:
    """Records that have not been acknowledged."""
    ack = journal.read_ack(storage)
    return journal.end(storage) - (ack.next if ack else 0)


def arrive(storage: Storage, number: int, what: str) -> None:
    """Until records below `number` are acknowledged."""
    until(lambda: (ack := journal.read_ack(storage)) is not None and ack.next >= number, what)


def grow(storage: Storage, by: int) -> None:
    """Until the journal has so many records more: nobody holds the driver up."""
    began = journal.end(storage)
    until(lambda: journal.end(storage) >= began + by, "more points in the journal")


def until(happened: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < limit, f"{what} did not arrive in {WAIT_S:.0f} s"
        time.sleep(0.1)


def verify(server: MlflowServer, place: Path) -> str:
    """What `jobs.tracking verify` says; it exits with 1 where journal and server differ."""
    command = [sys.executable, "-m", "jobs.tracking", "verify", str(place)]
    done = subprocess.run(command, env=os.environ | server.client, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def look(server: MlflowServer, steps: int, shipped: dict[str, int], put_us: list[float]) -> Told:
    """As any client of the server sees it, by the REST API alone."""
    import requests

    def ask(path: str, method: str = "GET", /, **values) -> dict:
        known = (ADMIN, PASSWORD) if server.auth else None
        sent = {"json" if method == "POST" else "params": values}
        url = f"{server.uri}/api/2.0/mlflow/{path}"
        answer = requests.request(method, url, auth=known, timeout=30, **sent)
        answer.raise_for_status()
        return answer.json()

    experiment = ask("experiments/get-by-name", experiment_name="outage")["experiment"]["experiment_id"]
    runs = ask("runs/search", "POST", experiment_ids=[experiment])["runs"]
    run = runs[0]["info"]["run_id"]
    histories = {
        key: ask("metrics/get-history", run_id=run, metric_key=key, max_results=25_000)["metrics"] for key in KEYS
    }
    points = {key: [(int(point["step"]), point["value"]) for point in found] for key, found in histories.items()}
    params = {param["key"]: param["value"] for param in runs[0]["data"]["params"]}
    files = [file["path"] for file in ask("artifacts/list", run_id=run, path="figures")["files"]]
    return Told(steps, points, runs[0]["info"]["status"], params, files, len(runs), shipped, put_us)


# -- by hand -----------------------------------------------------------------------------------------------------------


@contextmanager
def running(kind: str, auth: bool, folder: Path) -> Iterator[MlflowServer]:
    """A server of its own, and its database. kind: sqlite or postgres."""
    with ExitStack() as ends:
        base: Database = sqlite(folder) if kind == "sqlite" else ends.enter_context(Postgres(folder)).database("mlflow")
        yield ends.enter_context(MlflowServer(folder, base, auth=auth))


def main() -> None:
    """One run; exits with 1 where the server does not have every point once."""
    parser = argparse.ArgumentParser(prog="python -m tests.outage", description=__doc__.partition("\n")[0])
    parser.add_argument("--server", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--auth", action="store_true", help="with a password")
    parser.add_argument("--seconds", type=float, default=60.0, help="that the server is away, and that it hangs")
    parser.add_argument("--drive", nargs=3, metavar=("PLACE", "URI", "LEASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        return drive(args.drive[0], args.drive[1], int(args.drive[2]))
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as folder, running(args.server, args.auth, Path(folder)) as server:
        told = story(server, Path(folder), args.seconds, args.seconds, say)
    wrong = [key for key in KEYS if sorted(told.points.get(key, [])) != curve(key, told.steps)]
    say(f"{told.steps} steps of {len(KEYS)} metrics; curves that differ: {wrong or 'none'}; {told.shipped}")
    median, longest = statistics.median(told.put_us), max(told.put_us)
    say(f"one put in the driver that took over: {median:.0f} us (median), {longest:.0f} us at most")
    return sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
