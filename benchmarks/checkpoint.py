"""What a checkpoint costs the steps around it, beside torch's own ways of saving; and what equal bits cost.

    python -m benchmarks.checkpoint [--quick] [--json FILE]

A ResNet-50 trains on small images, so that a step is short beside its state: 205 MB of weights and momentum. A turn is
some steps without a save, then a save and as many steps with it; what those took longer is what the checkpoint cost in
all, and the call itself is what it held up the one step. The first call, which meets fresh memory, is shown apart; on
a noisy machine the CPU time of the calling thread says what a quiet one would take. The ways take turns, round after
round, so that a noisy machine is noisy for all; each ends its writing before the next begins. Medians and quartiles are
printed. The second table is of `benchmarks.step`: what sums with equal bits cost beside plain ones.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import step as sums
from benchmarks.savers import Way, ways
from orchestrator.training.models.arch import Arch
from orchestrator.training.models.resnet import build
from orchestrator.training.step import TrainStep

SHOWN = [("call_ms", ".1f"), ("call_cpu_ms", ".1f"), ("cost_ms", ".0f"), ("steps_ratio", ".3f"), ("whole_ms", ".0f")]
TARGET_MS = 50.0  # that the call may hold up a step
LR = 1e-3  # small: the numbers must stay finite, what they are does not matter
FAST = "four lanes, fused"  # of benchmarks.step: the sum that the others are compared with
SUMS = {"ordered": "four lanes, fused, ordered sum", "exact": "four lanes, exact sum"}
QUICK = {"width": 16, "batch": 4, "rounds": 3, "steps": 4, "sum_rounds": 2}


@dataclass(frozen=True)
class Setting:
    depth: int = 50
    width: int = 64
    size: int = 32  # px
    batch: int = 4
    threads: int = 1
    rounds: int = 12
    steps: int = 5  # with a save, and as many without
    sum_rounds: int = 10  # of benchmarks.step; 0 leaves its table out


@dataclass(frozen=True)
class Turn:
    """Seconds of one save and of the steps around it."""

    call: float
    call_cpu: float  # of the calling thread
    without: list[float]
    with_it: list[float]
    whole: float  # from the call until all is written

    @property
    def cost(self) -> float:
        """What the save added to the training's time: the call, and what the steps after it took longer."""
        return self.call + sum(self.with_it) - sum(self.without)


# -- measuring ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    setting, args = _settings(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="skiplane-checkpoint-", dir=args.folder) as place:
        nbytes, turns = measure(setting, Path(place))
    rows = {name: row(found[1:]) | {"first_call_ms": 1000 * found[0].call} for name, found in turns.items()}
    _print(rows, setting, nbytes, load)
    costs = _sums(setting, sums.QUICK if args.quick else {})
    if args.json:
        about = {"setting": asdict(setting), "torch": torch.__version__, "cpus": os.cpu_count(), "load_average": load}
        args.json.write_text(json.dumps(about | {"state_bytes": nbytes, "ways": rows, "sums": costs}, indent=2) + "\n")
    return 0


def measure(setting: Setting, folder: Path) -> tuple[int, dict[str, list[Turn]]]:
    """Bytes of the state, and each way's turns, round by round; the first round is to warm up, and comes first."""
    torch.set_num_threads(setting.threads)
    train, once = _training(setting)
    once()  # momentum is there from the first step on
    state = train.state_dict()
    turns: dict[str, list[Turn]] = {}
    with ways(folder) as found:
        names = list(found)
        for number in range(-1, setting.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                turn = _turn(once, train, found[name], setting.steps, number + 2)
                turns.setdefault(name, []).append(turn)
    return sum(t.nbytes for named in state.values() for t in named.values()), {name: turns[name] for name in names}


def row(turns: Sequence[Turn]) -> dict[str, float]:
    """Medians and quartiles over the turns, in ms; `steps_ratio` is of a step with a save to one without."""
    parts = {
        "call_ms": [1000 * turn.call for turn in turns],
        "call_cpu_ms": [1000 * turn.call_cpu for turn in turns],
        "cost_ms": [1000 * turn.cost for turn in turns],
        "whole_ms": [1000 * turn.whole for turn in turns],
        "steps_ratio": [sum(turn.with_it) / sum(turn.without) for turn in turns],
    }
    found = {"step_ms": 1000 * statistics.median(second for turn in turns for second in turn.without)}
    for name, values in parts.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return found


def _training(setting: Setting) -> tuple[TrainStep, Callable[[], None]]:
    arch = Arch(depth=setting.depth, width=setting.width, stem="small" if setting.size < 64 else "imagenet")
    train = TrainStep(build(arch, 0), lanes=1, total_lanes=1, micro_batch=setting.batch)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.size, setting.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 1000, (setting.batch,), generator=generator)

    def once() -> None:
        train(images, labels, LR)

    return train, once


def _turn(once: Callable[[], None], train: TrainStep, way: Way, steps: int, number: int) -> Turn:
    without = [_timed(once) for _ in range(steps)]
    ends: list[float] = []
    began, cpu = time.perf_counter(), time.thread_time()
    way.save(train.state_dict(), number, lambda: ends.append(time.perf_counter()))
    call, cpu = time.perf_counter() - began, time.thread_time() - cpu
    with_it = [_timed(once) for _ in range(steps)]
    way.wait()
    return Turn(call, cpu, without, with_it, ends[0] - began)


def _timed(once: Callable[[], None]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began


def _sums(setting: Setting, others: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`exact` and `ordered` beside `fast`, as benchmarks.step measures them; also printed."""
    if not setting.sum_rounds:
        return {}
    of = sums.Setting(**{**others, "width": setting.width, "rounds": setting.sum_rounds})
    timings = sums.measure(of)
    costs = {name: sums.compared(timings[variant], timings[FAST]) for name, variant in SUMS.items()}
    table = Table(title=f"train.reduce beside fast: {of.title}", caption="within a round: median (quartiles)")
    for heading in ("", "wall ms/step", "to fast", "CPU ms/step", "to fast"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, cost in costs.items():
        table.add_row(name, *sums.cells(cost))
    Console(width=120).print(table)
    return costs


def _print(rows: dict[str, dict[str, float]], setting: Setting, nbytes: int, load: float) -> None:
    step = statistics.median(row["step_ms"] for row in rows.values())
    table = Table(
        title=f"A checkpoint of {nbytes / 1e6:.0f} MB: ResNet-{setting.depth}, width {setting.width}, "
        f"{setting.size} px, batch {setting.batch}, {setting.threads} thread(s), {step:.0f} ms a step, "
        f"{setting.rounds} rounds",
        caption=f"ms: median (quartiles); {setting.steps} steps with a save beside as many without; load {load:.1f}",
    )
    for heading in (
        "",
        "the call",
        "target",
        "its CPU",
        "the first",
        "cost in all",
        "steps with / without",
        "written after",
    ):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=heading == "")
    for name, found in rows.items():
        target = f"{TARGET_MS:.0f}" if name.startswith("skiplane") else ""
        call, cpu, cost, ratio, whole = (
            f"{found[key]:{form}} ({found[f'{key}_low']:{form}}–{found[f'{key}_high']:{form}})" for key, form in SHOWN
        )
        table.add_row(name, call, target, cpu, f"{found['first_call_ms']:.0f}", cost, ratio, whole)
    Console(width=150).print(table)


def _settings(argv: Sequence[str] | None) -> tuple[Setting, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description=(__doc__ or "").partition("\n")[0])
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=type(value), default=None, help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help=f"small: {QUICK}")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written; default: /tmp")
    args = parser.parse_args(argv)
    chosen = {name: getattr(args, name) for name in asdict(Setting()) if getattr(args, name) is not None}
    setting = Setting(**((QUICK if args.quick else {}) | chosen))
    for name, least in (("rounds", 1), ("steps", 1), ("sum_rounds", 0)):
        if getattr(setting, name) < least:
            parser.error(f"--{name} is {getattr(setting, name)}; at least {least} is needed")
    return setting, args


if __name__ == "__main__":
    raise SystemExit(main())
