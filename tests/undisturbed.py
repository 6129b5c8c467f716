"""A real training through all that can befall its tracking, and how long its steps took meanwhile.

    python -m tests.undisturbed --server postgres --auth --seconds 60
    python -m tests.undisturbed --rounds 5 --seconds 12      # in turns: a machine that drifts, drifts for all alike

`jobs.train` trains the digits. The server is killed and comes back; the process that sends is killed; the driver is
killed, and the same command given again; the server hangs; then the run is stopped, as with Ctrl-C. Afterwards
`jobs.tracking verify` compares journal and server, and the steps' times of before and during the outages are compared:
from the run's own curve `perf/step_s`.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from orchestrator.state.records import read_result
from orchestrator.state.storage import Storage
from orchestrator.tracking import journal
from orchestrator.tracking.records import Points, from_line
from tests.mlflow_servers import MlflowServer
from tests.outage import arrive, behind, grow, running, verify

ROOT = Path(__file__).parent.parent
FLAGS = ("--recipe", "digits-quick", "--name", "a", "--cluster.workers", "1", "--train.epochs", "100000",
         "--train.eval_epochs", "20", "--tracking.log_steps", "22", "--tracking.progress_seconds", "3600")  # fmt: skip
SETTLING = 20  # points after a start that are not compared: the first steps of a process are slower
Say = Callable[[str], None]


@dataclass(frozen=True)
class Told:
    """What came of it. steps: milliseconds a step, (median, points) in each part of the story."""

    verified: str
    tracking: dict[str, int]  # of result.json: records, shipped, refused
    steps: dict[str, tuple[float, int]]
    longest_gap: int  # steps between two neighbouring points of the curve, at most: one that was lost shows as 44


class Training:
    """`jobs.train`, from one start to its end."""

    def __init__(self, home: Path, storage: Path, server: MlflowServer, log: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"SKIPLANE_HOME": str(home), "PYTHONUNBUFFERED": "1", **server.client}
        line = [sys.executable, "-m", "jobs.train", *FLAGS, "--cluster.storage", str(storage)]
        self._file = log.open("a")
        self.process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=self._file, stderr=self._file)

    @property
    def shipper(self) -> psutil.Process:
        """The process that sends for it."""
        children = psutil.Process(self.process.pid).children()
        (found,) = (child for child in children if "orchestrator.tracking.shipping" in child.cmdline())
        return found

    def kill(self) -> None:
        """SIGKILL; its cluster ends by itself."""
        self.process.kill()
        self.process.wait()
        self._file.close()

    def stop(self) -> int:
        """As Ctrl-C does; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(120)
        finally:
            self._file.close()


def story(server: MlflowServer, home: Path, folder: Path, seconds: float, say: Say = lambda _: None) -> Told:
    """All of it against a server that is up. home: has the packed digits."""
    log, storage, parts = folder / "train.log", Storage(str(folder / "runs" / "a")), dict[str, tuple[float, float]]()

    def part(name: str) -> None:
        began = time.time()
        time.sleep(seconds)
        parts[name] = (began, time.time())

    training = Training(home, folder / "runs", server, log)
    try:
        arrive(storage, 5 + SETTLING, "the first points")
        say("all is well")
        part("before")
        say("the server is killed")
        server.kill()
        part("the server is away")
        say(f"{behind(storage)} records wait; the server is started")
        server.start()
        arrive(storage, journal.end(storage), "what waited for the server")
        say("the process that sends is killed")
        training.shipper.kill()
        arrive(storage, journal.end(storage), "what waited for another process that sends")
        say("all is well")
        part("between")
        say("the server hangs")
        with server.frozen():
            part("the server hangs")
        say(f"{behind(storage)} records wait; the server goes on")
        arrive(storage, journal.end(storage), "what waited for the server to go on")
        say("the driver is killed, and the command given again")
        training.kill()
        training = Training(home, folder / "runs", server, log)
        grow(storage, 5 + SETTLING)
        say("all is well")
        part("after")
        say("the run is stopped")
        assert training.stop() == 130, log.read_text()[-2000:]
    finally:
        if training.process.poll() is None:
            training.kill()
    result = read_result(storage)
    assert result is not None
    said = verify(server, folder / "runs" / "a").strip()
    say(said)
    points = timed(storage)
    steps = [point.step for point in points]
    gap = max(b - a for a, b in itertools.pairwise(steps))
    return Told(said, result.tracking, {name: median(points, *when) for name, when in parts.items()}, gap)


def in_turns(server: MlflowServer, home: Path, folder: Path, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the steps, in turns: with a server, with one that hangs, with one that is gone."""
    storage, parts = Storage(str(folder / "runs" / "a")), dict[str, list[tuple[float, float]]]()

    def part(name: str) -> None:
        began = time.time()
        time.sleep(seconds)
        parts.setdefault(name, []).append((began, time.time()))

    training = Training(home, folder / "runs", server, folder / "train.log")
    try:
        arrive(storage, 5 + SETTLING, "the first points")
        for _ in range(rounds):
            part("all is well")
            with server.frozen():
                part("the server hangs")
            arrive(storage, journal.end(storage), "what waited")
            part("all is well")
            server.kill()
            part("the server is away")
            server.start()
            arrive(storage, journal.end(storage), "what waited")
        assert training.stop() == 130
    finally:
        if training.process.poll() is None:
            training.kill()
    points = timed(storage)
    return {name: [step for when in times for step in within(points, *when)] for name, times in parts.items()}


def timed(storage: Storage) -> list[Points]:
    """The points of the curve `perf/step_s`."""
    records = (from_line(line) for _, line in journal.lines(storage))
    return [record for record in records if isinstance(record, Points) and "perf/step_s" in record.values]


def within(points: list[Points], began: float, ended: float) -> list[float]:
    """Milliseconds a step of those between two times, in seconds."""
    return [1000 * p.values["perf/step_s"] for p in points if began <= p.timestamp_ms / 1000 <= ended]


def median(points: list[Points], began: float, ended: float) -> tuple[float, int]:
    """(median of a step in ms, points) of those between two times, in seconds."""
    found = within(points, began, ended)
    return statistics.median(found), len(found)


def main() -> None:
    """One story, as a table of the steps' times, and JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.undisturbed", description=__doc__.partition("\n")[0])
    parser.add_argument("--server", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--auth", action="store_true", help="with a password")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part")
    parser.add_argument("--rounds", type=int, default=0, help="in turns, so many times; without the killed driver")
    parser.add_argument("--home", type=Path, required=True, help="where data/digits is: $SKIPLANE_HOME")
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as folder, running(args.server, args.auth, Path(folder)) as server:
        if args.rounds:
            steps = in_turns(server, args.home, Path(folder), args.seconds, args.rounds)
            show({name: (statistics.median(found), len(found)) for name, found in steps.items()})
            return
        told = story(server, args.home, Path(folder), args.seconds, say)
    show(told.steps)
    print(json.dumps(asdict(told)))


def show(steps: dict[str, tuple[float, int]]) -> None:
    """Each part beside the first one."""
    first, healthy = next((name, each) for name, (each, _) in steps.items())
    for name, (each, count) in steps.items():
        print(f"{name:<20}{each:8.3f} ms a step, median of {count} points: {each / healthy:.3f} of '{first}'")


if __name__ == "__main__":
    main()
