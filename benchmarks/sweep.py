"""Seconds that a sweep costs beyond its training, a trial, beside Ray's stock way with the same grid.

    python -m benchmarks.sweep [--rounds N] [--cases none:2,none:1,asha:2] [--ways skiplane,stock]
                               [--quick] [--json FILE]

Starts a one-machine cluster of its own (free ports, a temporary $SKIPLANE_HOME, ended afterwards), with a real MLflow
server. In every round the grid is first trained bare (benchmarks/bare.py); then each way runs it, for each case: the
rule that stops trials, and how many run at once. Ways: Skiplane; Ray's own, as documented (benchmarks/stock.py); the
same with Skiplane's settings of Ray. All train the same: their accuracies are compared, digit by digit.

A way's overhead is (seconds from its command to its end x trials at once - bare seconds of what it trained) / trials.
Its CPU seconds are those of driver, cluster and MLflow. One machine has all of it: compare the ways.
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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import stock
from benchmarks.meter import Meter
from benchmarks.swept import OURS, Bare, Trial, Turn, against, figures
from jobs import edge
from orchestrator.cluster import local, processes, services
from pipelines.errors import ClusterError, ConfigError
from pipelines.pack import pack
from pipelines.sources.digits import digits

ROOT = Path(__file__).parent.parent
TARGET = 0.5  # of the stock way's overhead
LIMIT_S = 900  # that a sweep may take
SETTLED, SETTLE_S = 0.3, 60.0  # CPU seconds a second of a cluster that does nothing, and how long that is waited for


@dataclass(frozen=True)
class Way:
    """What runs the sweep, and what it calls an epoch's accuracy in MLflow."""

    module: str
    metric: str
    tuned: bool = False


WAYS = {
    OURS: Way("jobs.sweep", "val/top1"),
    "stock": Way("benchmarks.stock", "val_top1"),
    "stock-tuned": Way("benchmarks.stock", "val_top1", tuned=True),
}


@dataclass(frozen=True)
class Setting:
    """What is measured. cases: sweep.stop and sweep.concurrent."""

    recipe: str = "digits-quick"
    depths: str = "18,34"
    rates: str = "0.1,0.2"
    epochs: int = 3
    rounds: int = 3
    cases: tuple[str, ...] = ("none:2", "none:1", "asha:2")
    ways: tuple[str, ...] = (OURS, "stock")


QUICK: dict[str, Any] = {"depths": "18", "rates": "0.1", "epochs": 1, "rounds": 1, "cases": ("none:1",)}


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 measured, 2 setting, 4 the cluster or a sweep failed."""
    setting, file = _settings(argv)
    rows: list[dict[str, Any]] = []
    with _cluster() as cluster, Meter([service.mark for service in cluster.services.values()]) as meter:
        for number in range(setting.rounds):
            bare = train_bare(cluster, setting)
            for case in setting.cases:
                for name in setting.ways if number % 2 == 0 else setting.ways[::-1]:
                    load = os.getloadavg()[0]
                    turn = measure(cluster, meter, setting, name, case, f"{name}-{case.replace(':', '-')}-{number}")
                    about = {"round": number, "case": case, "way": name, "load_average_before": load}
                    rows.append(about | figures(turn, bare, int(case.partition(":")[2])))
                    edge.say(f"round {number + 1} {case} {name}: {_line(rows[-1])}")
            if file:
                _write(file, setting, rows)
    _print(rows, _ratios(rows, setting))
    return 0


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextmanager
def _cluster() -> Iterator[local.Cluster]:
    """A cluster with packed digits."""
    with tempfile.TemporaryDirectory(prefix="skiplane-sweep-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        pack(digits(), home / "data" / "digits", seed=0, shard_samples=180, progress=lambda *_: None)
        try:
            yield local.up(home, {name: processes.free_port() for name in local.DEFAULT_PORTS}, edge.say)
        finally:
            local.down(home, edge.say)


def train_bare(cluster: local.Cluster, setting: Setting) -> list[Bare]:
    """The trials, one after the other."""
    return list(json.loads(_run(cluster, "benchmarks.bare", _flags(setting, "bare", "none:1"), {}).splitlines()[-1]))


def measure(cluster: local.Cluster, meter: Meter, setting: Setting, name: str, case: str, sweep: str) -> Turn:
    """One sweep."""
    _settle(meter)
    way, used, began = WAYS[name], meter.cpu_s(), time.time()
    _run(cluster, way.module, _flags(setting, sweep, case), {stock.TUNED: "tuned"} if way.tuned else {})
    wall_s, cpu_s = time.time() - began, meter.cpu_s() - used
    return Turn(began, wall_s, cpu_s, _tracked(cluster, sweep, way.metric))


def _flags(setting: Setting, name: str, case: str) -> list[str]:
    stop, _, concurrent = case.partition(":")
    flags = {
        "recipe": setting.recipe, "name": name, "train.epochs": setting.epochs, "tracking.experiment": name,
        "sweep.depth": setting.depths, "sweep.lr": setting.rates, "sweep.stop": stop, "sweep.concurrent": concurrent,
    }  # fmt: skip
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def _run(cluster: local.Cluster, module: str, flags: Sequence[str], more: Mapping[str, str]) -> str:
    """What a command said that uses the cluster, and is counted with it. Raises ClusterError with its last words."""
    shell = services.environment(cluster.home, cluster.ports, os.environ)
    address = f"{services.HOST}:{cluster.ports['ray']}"
    own = {"RAY_ADDRESS": address, processes.MARK: cluster.services["ray"].mark, **more}
    log = cluster.folder / "sweep.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", module, *flags]
        try:
            subprocess.run(command, env=shell | own, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                           timeout=LIMIT_S, check=True)  # fmt: skip
        except subprocess.SubprocessError as error:
            raise ClusterError(f"{error}; its last words:\n{processes.tail(log, 30)}") from error
    return log.read_text()


def _settle(meter: Meter) -> None:
    """Until what the sweep before has left is gone."""
    limit = time.monotonic() + SETTLE_S
    while time.monotonic() < limit:
        used = meter.cpu_s()
        time.sleep(1.0)
        if meter.cpu_s() - used < SETTLED:
            return


def _tracked(cluster: local.Cluster, experiment: str, metric: str) -> list[Trial]:
    """The trials, by what MLflow has of them. The worker's own clock is its points' time, or a metric."""
    from mlflow import MlflowClient

    client = MlflowClient(cluster.url("mlflow"))
    found = client.get_experiment_by_name(experiment)
    trials = []
    for run in client.search_runs([found.experiment_id]):
        if metric in run.data.metrics:
            points = client.get_metric_history(run.info.run_id, metric)
            clock = [point.value for point in client.get_metric_history(run.info.run_id, "time_ms")]
            ends = sorted(clock or [point.timestamp for point in points])
            top1 = [point.value for point in sorted(points, key=lambda point: point.step)]
            point = {name: run.data.params[name] for name in ("model.depth", "optim.lr")}
            trials.append(Trial(point, top1, [end / 1000 for end in ends]))
    return trials


# -- words -------------------------------------------------------------------------------------------------------------


def _ratios(rows: Sequence[Mapping[str, Any]], setting: Setting) -> dict[str, Any]:
    return {way: against(rows, way) for way in setting.ways if way != OURS and OURS in setting.ways}


def _write(file: Path, setting: Setting, rows: Sequence[Mapping[str, Any]]) -> None:
    """After each round: a peer that hangs leaves the rounds before it."""
    about = {"setting": asdict(setting), "cpus": os.cpu_count(), "target": TARGET}
    file.write_text(json.dumps(about | {"turns": rows, "ours_to_its": _ratios(rows, setting)}, indent=2) + "\n")


def _line(row: Mapping[str, Any]) -> str:
    return (f"{row['wall_s']:.1f} s, {row['epochs']} epochs; overhead a trial {row['overhead_s']:.1f} s, "
            f"{row['cpu_overhead_s']:.1f} CPU s")  # fmt: skip


def _print(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    names = {"wall_s": "seconds", "cpu_s": "CPU s", "epochs": "epochs", "overhead_s": "overhead a trial, s",
             "cpu_overhead_s": "CPU s", "until_first_epoch_s": "until a first epoch", "first_to_last_epoch_s":
             "to the last", "after_last_epoch_s": "after it", "inside_trials_s": "inside trials"}  # fmt: skip
    table = Table(title=f"{os.cpu_count()} CPUs", caption="median of the rounds")
    for heading in ("case", "way", *names.values()):
        table.add_column(heading, justify="left" if heading in ("case", "way") else "right")
    for case, way in dict.fromkeys((row["case"], row["way"]) for row in rows):
        its = [row for row in rows if (row["case"], row["way"]) == (case, way)]
        table.add_row(case, way, *(f"{statistics.median(row[name] for row in its):.1f}" for name in names))
    Console(width=150).print(table)
    for way, cases in found.items():
        for case, ratios in cases.items():
            said = ", ".join(f"{name[:-2].replace('_', ' ')} {_of(part)}" for name, part in ratios.items())
            edge.say(f"{case}: {OURS} / {way}: {said}")


def _of(part: Mapping[str, float]) -> str:
    return f"{part['median']:.2f} ({part['least']:.2f} - {part['most']:.2f})"


def _settings(argv: Sequence[str]) -> tuple[Setting, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").partition("\n")[0])
    for name, value in asdict(Setting()).items():
        many = isinstance(value, tuple)
        shown = ",".join(value) if many else value
        parser.add_argument(f"--{name}", type=_list if many else type(value), help=f"default {shown}")
    parser.add_argument("--quick", action="store_true", help=f"short: {QUICK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    given = vars(parser.parse_args(argv))
    file, quick = given.pop("json"), given.pop("quick")
    setting = Setting(**(QUICK if quick else {}) | {name: value for name, value in given.items() if value is not None})
    if unknown := set(setting.ways) - set(WAYS):
        raise ConfigError(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    for case in setting.cases:
        stop, _, concurrent = case.partition(":")
        if stop not in ("none", "asha") or not concurrent.isdecimal() or int(concurrent) < 1:
            raise ConfigError(f"--cases: '{case}' is no case; give none:N or asha:N, N trials at once")
    return setting, file


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    edge.run(main)
