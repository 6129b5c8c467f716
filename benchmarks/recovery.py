"""Seconds from a fault to the next new step, where they go, and what share of time is useful under faults.

    python -m benchmarks.recovery [--rounds N] [--faults worker,node,cut] [--ways ...] [--goodput MINUTES]
                                  [--quick] [--json FILE]

On hosts of this machine (root; see tests/hosts.py): a head, where the driver is, and two with room for one worker
each. In every round one run a way suffers every fault: SIGKILL of a worker; of all of a host, which comes back ten
seconds after the run goes on; a cut link, healed as late. Ways: Skiplane, and Ray Train's own elastic mode around the
same worker (benchmarks/elastic.py); each with the settings that ship in infra/ray.env and with Ray's defaults.

All hosts share this machine's cores, so what starts processes takes longer than on real ones: compare the ways.
"""

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.recovered import Recovered, Stretch, recovered, useful
from jobs import edge
from pipelines.errors import ClusterError, ConfigError
from pipelines.pack import pack
from pipelines.sources.digits import digits
from tests.hosts import Hosts, supported
from tests.watched import Watched

FAULTS = ("worker", "node", "cut")
# Of `ray start`, as Ray has them where nobody says otherwise.
NODE_DEFAULTS = {
    "RAY_health_check_initial_delay_ms": "5000", "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "10000", "RAY_health_check_failure_threshold": "5", "RAY_worker_niceness": "15",
}  # fmt: skip
# Of a driver, likewise.
DRIVER_DEFAULTS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}
CALM = 40  # steps that pass before a fault
AWAY_S = 10.0  # that a host stays away after the run has gone on
LIMIT_S = 240.0  # that is waited for anything
NAME = "recovery"


@dataclass(frozen=True)
class Way:
    """What trains, on which settings."""

    module: str
    shipped: bool


WAYS = {
    "skiplane": Way("jobs.train", True),
    "skiplane-defaults": Way("jobs.train", False),
    "elastic": Way("benchmarks.elastic", True),
    "elastic-defaults": Way("benchmarks.elastic", False),
}


@dataclass(frozen=True)
class Setting:
    """What is measured. width: channels of the net's first stage: a step should take some tenths of a second."""

    rounds: int = 3
    faults: tuple[str, ...] = FAULTS
    ways: tuple[str, ...] = tuple(WAYS)
    width: int = 32
    goodput: float = 0.0  # minutes; 0 = not measured
    every: float = 120.0  # seconds between its faults


QUICK: dict[str, Any] = {"rounds": 1, "faults": ("worker",), "ways": ("skiplane",), "width": 8}


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 measured, 2 setting, 4 a run did not go on, or hosts cannot be made here."""
    setting, file = _settings(argv)
    if reason := supported():
        raise ClusterError(reason)
    found: list[dict[str, Any]] = []
    for number in range(setting.rounds):
        for name in setting.ways if number % 2 == 0 else setting.ways[::-1]:
            with trial(WAYS[name], setting) as run:
                for fault in setting.faults:
                    after = run.suffer(fault)
                    found.append({"round": number, "way": name, "fault": fault, **asdict(after)})
                    edge.say(f"round {number + 1} {name} {fault}: {after.stall_s:.1f} s without a new step, "
                             f"{after.repeated} steps repeated")  # fmt: skip
    good = goodput(setting) if setting.goodput else None
    _print(found, good)
    if file:
        load = os.getloadavg()[1]
        about = {"setting": asdict(setting), "cpus": os.cpu_count(), "load_average_5_min": load}
        file.write_text(json.dumps(about | {"faults": found, "goodput": good}, indent=2) + "\n")
    return 0


def goodput(setting: Setting) -> dict[str, float]:
    """Of one run of Skiplane with a fault every so many seconds, of each kind in turn."""
    with trial(WAYS["skiplane"], setting) as run:
        run.calm()
        calm, began, number = run.step_s(), time.monotonic(), 0
        while time.monotonic() - began < 60 * setting.goodput:
            run.suffer(setting.faults[number % len(setting.faults)])
            number += 1
            run.wait(began + number * setting.every - time.monotonic())
        return {"faults": number, "minutes": setting.goodput, **useful(run.watched.events, began, calm)}


class Run:
    """A run that is watched, and struck."""

    def __init__(self, hosts: Hosts, command: Sequence[str], environment: dict[str, str]) -> None:
        self._hosts, self._away, self._looked = hosts, set[int](), 0.0
        self.watched = Watched(lambda: hosts.run(0, [sys.executable, *command], environment), io.StringIO())
        self.watched.start()

    def suffer(self, fault: str) -> Recovered:
        """Strikes when two workers have trained for a while; ends when a new step came and what was away is back."""
        self.calm()
        first, before = len(self.watched.events), self.watched.newest
        host = max(i for i in (1, 2) if self._hosts.workers(i))
        if fault != "worker":
            self._away.add(host)
        began = time.monotonic()
        {"worker": lambda: self._hosts.workers(host)[0].kill(), "node": lambda: self._hosts.kill(host),
         "cut": lambda: self._hosts.cut(host)}[fault]()  # fmt: skip
        self.until(lambda: recovered(before, began, self.watched.events[first:]) is not None)
        after = recovered(before, began, self.watched.events[first:])
        assert after is not None
        if fault != "worker":
            self.wait(AWAY_S)
            self._hosts.heal(host)
            self._away.clear()
        return after

    def calm(self) -> None:
        """Until two workers have trained for CALM steps."""
        self.until(lambda: all(self._hosts.workers(i) for i in (1, 2)))
        goal = self.watched.newest.step + CALM
        self.until(lambda: self.watched.newest.step >= goal and all(self._hosts.workers(i) for i in (1, 2)))

    def wait(self, seconds: float) -> None:
        """While the run goes on."""
        due = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= due)

    def step_s(self) -> float:
        """A step's time, evaluations in between included, of those heard last: lines come in bursts, so their mean."""
        times = [event.at for event in self.watched.events if event.kind == "step"][-CALM:]
        return (times[-1] - times[0]) / (len(times) - 1)

    def until(self, true: Callable[[], bool]) -> None:
        """Listens until it is. Raises ClusterError where the run ends, or nothing comes of it."""
        limit = time.monotonic() + LIMIT_S
        while not true():
            self.watched.listen(0.1)
            self._repair()
            if self.watched.code is not None or time.monotonic() > limit:
                told = "\n".join(event.text for event in self.watched.events[-20:])
                raise ClusterError(f"the run did not go on (exit code {self.watched.code}); it said last:\n{told}")

    def _repair(self) -> None:
        """Starts what is not meant to be away: a node that was cut off for long ends by itself when it hears of it."""
        if time.monotonic() - self._looked > 1.0:
            self._looked = time.monotonic()
            for host in {1, 2} - self._away:
                self._hosts.add(host)


@contextmanager
def trial(way: Way, setting: Setting) -> Iterator[Run]:
    """Hosts and a run on them that would never end by itself."""
    with Hosts(cpus=(0, 1, 1), settings={} if way.shipped else NODE_DEFAULTS) as hosts:
        pack(digits(), hosts.shared / "digits", seed=0, shard_samples=180, progress=lambda *_: None)
        hosts.wait(hosts.count)
        yield Run(hosts, _command(way, hosts, setting), {} if way.shipped else DRIVER_DEFAULTS)


def _command(way: Way, hosts: Hosts, setting: Setting) -> list[str]:
    flags = {
        "recipe": "digits", "name": NAME, "data.root": hosts.shared / "digits",
        "cluster.storage": hosts.shared / "runs",
        "model.width": setting.width, "cluster.workers": "1..2", "train.epochs": 5000, "cluster.grow_seconds": 10,
        "tracking.uri": "off", "tracking.log_steps": 1, "tracking.progress_seconds": 1e-6,
    }  # fmt: skip
    return ["-m", way.module, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


# -- words -------------------------------------------------------------------------------------------------------------


def _print(found: Sequence[dict[str, Any]], good: dict[str, float] | None) -> None:
    table = Table(title=f"seconds, median (least - most), {os.cpu_count()} CPUs for all hosts")
    for heading in ("fault", "way", "without a new step", *Stretch, "steps repeated"):
        table.add_column(heading, justify="left" if heading in ("fault", "way") else "right")
    for fault in FAULTS:
        for way in WAYS:
            rows = [row for row in found if (row["fault"], row["way"]) == (fault, way)]
            if rows:
                cells = [_spread([row["stretches"].get(name) for row in rows]) for name in Stretch]
                repeated = statistics.median(row["repeated"] for row in rows)
                table.add_row(fault, way, _spread([row["stall_s"] for row in rows]), *cells, f"{repeated:g}")
    Console(width=150).print(table)
    if good:
        edge.say(f"goodput: {good['faults']:.0f} faults in {good['minutes']:g} minutes; new steps were made in "
                 f"{good['training']:.1%} of the time, and {good['full_speed']:.1%} of what two workers undisturbed "
                 f"would have done was done")  # fmt: skip


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f} ({min(known):.1f} - {max(known):.1f})" if known else "-"


def _settings(argv: Sequence[str]) -> tuple[Setting, Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery", description=(__doc__ or "").partition("\n")[0]
    )
    for name, value in asdict(Setting()).items():
        many = isinstance(value, tuple)
        shown = ",".join(value) if many else value
        parser.add_argument(f"--{name}", type=_list if many else type(value), help=f"default {shown}")
    parser.add_argument("--quick", action="store_true", help=f"short: {QUICK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    given = vars(parser.parse_args(argv))
    file, quick = given.pop("json"), given.pop("quick")
    chosen = {name: value for name, value in given.items() if value is not None}
    setting = Setting(**(QUICK if quick else {}) | chosen)
    for name, known in (("faults", FAULTS), ("ways", tuple(WAYS))):
        if unknown := set(getattr(setting, name)) - set(known):
            raise ConfigError(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return setting, file


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    edge.run(main)
