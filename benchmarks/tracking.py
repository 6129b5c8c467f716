"""What tracking costs the thread that trains, in microseconds a point, and how many points are lost on the way.

    python -m benchmarks.tracking [--rounds N] [--cases healthy:1,refused:10] [--ways skiplane,mlflow]
                                  [--quick] [--json FILE]

Each way runs in a process of its own, against one real MLflow server (SQLite) on this machine. It does some steps that
report nothing, then those that count; a step multiplies two matrices, about 5 ms on one core. A point is what a worker
reports at an interval's end: 9 metrics. Ways take turns, round after round, so that a noisy machine is noisy for all;
ratios are taken within a round, steps are compared with the bare ones of the same process.

Ways (benchmarks/trackers.py): Skiplane's, in a worker on Ray; the same without Ray, with all that the driver does for a
point on the thread that trains; `mlflow.log_metrics`, synchronous, asynchronous, and asynchronous with a buffer; and
Ray's own callback for Tune, as its `log_trial_result`, which Tune's loop calls with every report before the trial goes
on. The `-short` ways give up soon and go on without the point: an outage of seconds is to them what one of minutes is
to MLflow's defaults (one call to a closed port: 246 s, then it raises). They run in outages alone, and the callback
where not every step reports: it sends a request for each metric.

A case is what happens, and every how many steps a point is reported. From a quarter of the steps on, for some seconds:
refused, the server is killed and started again; hung, it stands still (SIGSTOP). killed: the process that trains is,
right after its last step, by SIGKILL. A worker on Ray may lose a message that it was just sending. Without Ray the
driver dies, too, and what it has not written yet, half a second: the rest of its journal is then sent by hand
(`jobs.tracking sync`). In a run, the next group trains those steps again, or a checkpoint brings their points. Lost are
the points of which the server has not got everything when the way has ended by itself and the server is there.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.outage import OUTAGES, serving
from benchmarks.reporting import Job
from benchmarks.tracked import OURS, RATIOS, against, figures, summary
from benchmarks.trackers import WAYS
from benchmarks.turns import measure
from jobs import edge
from pipelines.errors import ConfigError

CONDITIONS = ("healthy", *OUTAGES, "killed")
CALLBACK = "ray-callback"
SHOWN = {
    "call_us": "us a point", "call_us_p95": "p95", "call_us_greatest": "greatest", "held_up_s": "held up, s",
    "bare_ms": "bare step, ms", "step_to_bare": "step / bare", "median_step_to_bare": "median step / bare",
    "after_s": "until sent, s",
}  # fmt: skip
COUNTED = {
    "points": "points",
    "lost": "lost",
    "doubled": "doubled",
    "errors": "calls that raised",
    "failed": "could not end",
}
CAPTION = "median (quartiles) of the rounds; counts are of all rounds"
PARTS = ("median", "low", "high")


@dataclass(frozen=True)
class Setting:
    """What is measured. cases: condition and every how many steps a point is reported."""

    bare: int = 300  # steps
    steps: int = 1000
    away_s: float = 6.0  # of an outage
    settle_s: float = 15.0  # at most, that a process waits before its first step for others to be quiet
    rounds: int = 3
    cases: tuple[str, ...] = ("healthy:1", "healthy:10", "refused:10", "hung:10", "killed:1")
    ways: tuple[str, ...] = tuple(WAYS)


QUICK: dict[str, Any] = {
    "bare": 50,
    "steps": 200,
    "away_s": 2.0,
    "settle_s": 2.0,
    "rounds": 1,
    "cases": ("healthy:10", "hung:10"),
}


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 measured, 2 setting, 4 a way failed."""
    setting, file = _settings(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="skiplane-tracking-") as folder, serving(Path(folder)) as server:
        for number in range(setting.rounds):
            for case, name in _turns(setting, number):
                load = os.getloadavg()[0]
                job = _job(setting, name, case, server.uri, Path(folder, f"{name}-{case.replace(':', '-')}-{number}"))
                turn = measure(server, job, _parts(case)[0], setting.away_s)
                about = {"round": number, "case": case, "way": name, "load_average_before": load}
                rows.append(about | figures(turn))
                edge.say(f"round {number + 1} {case} {name}: {_line(rows[-1])}")
            if file:
                _write(file, setting, rows)
    _print(rows)
    return 0


# -- measuring ---------------------------------------------------------------------------------------------------------


def _turns(setting: Setting, number: int) -> Iterator[tuple[str, str]]:
    """(case, way) of a round; every other one goes through the ways from the last to the first."""
    for case in setting.cases:
        condition, every = _parts(case)
        for name in setting.ways if number % 2 == 0 else setting.ways[::-1]:
            patient = not name.endswith("-short") or condition in OUTAGES
            if patient and (name != CALLBACK or (every > 1 and condition != "killed")):
                yield case, name


def _job(setting: Setting, name: str, case: str, uri: str, folder: Path) -> Job:
    """What one turn has to do; makes its folder."""
    folder.mkdir()
    condition, every = _parts(case)
    about = (name, uri, str(folder), folder.name)
    return Job(*about, setting.bare, setting.steps, every, setting.settle_s, killed=condition == "killed")


def _parts(case: str) -> tuple[str, int]:
    """Condition, and every how many steps a point is reported."""
    condition, _, every = case.partition(":")
    return condition, int(every)


# -- words -------------------------------------------------------------------------------------------------------------


def _write(file: Path, setting: Setting, rows: Sequence[Mapping[str, Any]]) -> None:
    """After each round: a peer that hangs leaves the rounds before it."""
    about = {"setting": asdict(setting), "cpus": os.cpu_count(), "ways": {name: way.says for name, way in WAYS.items()}}
    found = {"turns": rows, "summary": summary(rows), "its_to_ours": against(rows)}
    file.write_text(json.dumps(about | found, indent=2) + "\n")


def _line(row: Mapping[str, Any]) -> str:
    return (f"{row['call_us']:,.0f} us a point, {row['call_us_greatest']:,.0f} at most; steps "
            f"{100 * (row['step_to_bare'] - 1):+.1f}%; lost {row['lost']} of {row['points']}")  # fmt: skip


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    for case, ways in summary(rows).items():
        table = Table(title=f"{case}: tracking, on the thread that trains; {os.cpu_count()} CPUs", caption=CAPTION)
        for heading in ("way", *SHOWN.values(), *COUNTED.values()):
            table.add_column(heading, justify="left" if heading == "way" else "right")
        for way, found in ways.items():
            its = [row for row in rows if (row["case"], row["way"]) == (case, way)]
            counts = (f"{sum(row[name] for row in its):,}" for name in COUNTED)
            table.add_row(way, *(_cell(found[name]) for name in SHOWN), *counts)
        Console(width=190).print(table)
    for case, others in against(rows).items():
        for way, ratios in others.items():
            said = ", ".join(f"{SHOWN[name]} {_cell(ratios[name])}" for name in RATIOS)
            edge.say(f"{case}: {way} / {OURS}: {said}")


def _cell(found: Mapping[str, float]) -> str:
    """Median (quartiles), with three digits that say something."""
    middle, low, high = (f"{found[part]:,.0f}" if found[part] >= 100 else f"{found[part]:.3g}" for part in PARTS)
    return middle if middle == low == high else f"{middle} ({low} - {high})"


def _settings(argv: Sequence[str]) -> tuple[Setting, Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tracking", description=(__doc__ or "").partition("\n")[0]
    )
    for name, value in asdict(Setting()).items():
        many = isinstance(value, tuple)
        shown = ",".join(value) if many else value
        parser.add_argument(f"--{name}", type=_list if many else type(value), help=f"default {shown}")
    parser.add_argument("--quick", action="store_true", help=f"short: {QUICK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    given = vars(parser.parse_args(argv))
    file, quick = given.pop("json"), given.pop("quick")
    setting = Setting(**(QUICK if quick else {}) | {name: value for name, value in given.items() if value is not None})
    _check(setting)
    return setting, file


def _check(setting: Setting) -> None:
    """Raises ConfigError."""
    for name in ("bare", "steps", "rounds"):
        if getattr(setting, name) < 1:
            raise ConfigError(f"--{name} is {getattr(setting, name)}; at least 1 is needed")
    if unknown := set(setting.ways) - set(WAYS):
        raise ConfigError(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    for case in setting.cases:
        condition, _, every = case.partition(":")
        if condition not in CONDITIONS or not every.isdecimal() or not 1 <= int(every) <= setting.steps:
            raise ConfigError(f"--cases: '{case}' is no case; give one of {', '.join(CONDITIONS)}, a colon, and every "
                              f"how many steps a point is reported (1 to {setting.steps})")  # fmt: skip


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    edge.run(main)
