"""What metrics cost the thread that trains: microseconds a step and a word to Ray, and the step with and without them.

    python -m benchmarks.metering [--blocks N] [--quick] [--json FILE]

A process on a Ray of its own counts as a worker does whose dataset is on a server: 12 counters (an Odometer, in Ray's
metrics). A step multiplies two matrices, about 5 ms on one core. Blocks of steps with and without counting take turns,
so that a machine that drifts drifts for both; a ratio is of two blocks that follow each other.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

import torch

from benchmarks.reporting import SIDE
from jobs import edge
from orchestrator import settings
from orchestrator.cluster.environment import prepare
from orchestrator.context import LocalContext
from orchestrator.meters import WORKER
from orchestrator.odometer import TELL_S, Odometer
from orchestrator.training.loop import StepDone

STEPS = 20  # of a block
FED = [meter.name for meter in WORKER if meter.name.startswith(("cache", "fetch"))]


class Counting(LocalContext):
    """Counts as a worker on Ray does."""

    def count(self, run: str, amounts: Mapping[str, float]) -> None:
        from orchestrator.cluster import metering

        metering.count({"run": run, "rank": str(self.rank)}, amounts)


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 measured, 2 setting."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metering", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--blocks", type=int, default=200, help=f"of {STEPS} steps, each way; default 200")
    parser.add_argument("--quick", action="store_true", help="20 blocks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    given = parser.parse_args(argv)
    figures = measured(20 if given.quick else given.blocks)
    if given.json:
        given.json.write_text(json.dumps({"cpus": os.cpu_count(), **figures}, indent=2) + "\n")
    edge.say(
        f"counting: {figures['add_us']:.2f} us a step, {figures['tell_us']:.0f} us a word to Ray "
        f"(p95 {figures['tell_us_p95']:.0f}), one each {TELL_S:g} s of training and one at the end"
    )
    edge.say(f"step: {figures['step_ms']:.3f} ms; with counting / without, {figures['blocks']} pairs of blocks:")
    for clock, says in (("wall", "on the clock"), ("cpu", "of the thread's own time")):
        low, middle, high = figures[f"{clock}_ratio"]
        edge.say(f"  {says}: median {middle:.4f} (quartiles {low:.4f} - {high:.4f})")
    return 0


def measured(blocks: int) -> dict[str, Any]:
    """On a Ray that is started for it."""
    prepare(settings.Edge.of_environment().home)
    from orchestrator.cluster.session import session

    torch.set_num_threads(1)
    with session(1):
        fed = dict.fromkeys(FED, 0)
        odometer = Odometer(Counting(), "benchmark", 32, lambda: {name: fed[name] + 1 for name in fed})
        return _alone(odometer) | _in_turns(odometer, blocks)


def _alone(odometer: Odometer) -> dict[str, float]:
    """Calls without training around them."""
    done, calls, words = _done(1e-9), 100_000, []
    began = time.perf_counter()
    for _ in range(calls):
        odometer.add(done)
    add_us = 1e6 * (time.perf_counter() - began) / calls
    for _ in range(1000):
        began = time.perf_counter()
        odometer.tell()
        words.append(1e6 * (time.perf_counter() - began))
    return {"add_us": add_us, "tell_us": median(words), "tell_us_p95": sorted(words)[950]}


def _in_turns(odometer: Odometer, blocks: int) -> dict[str, Any]:
    matrix, took = torch.rand(SIDE, SIDE), list[tuple[Took, Took]]()
    for number in range(-2, blocks):  # the first ones warm up
        counting = number % 2 == 0  # every other pair begins with the other way
        one, other = (_block(matrix, odometer if counts else None) for counts in (counting, not counting))
        took.append((one, other) if counting else (other, one))
    pairs = took[2:]
    clocks = {"wall": [(a.wall_s, b.wall_s) for a, b in pairs], "cpu": [(a.cpu_s, b.cpu_s) for a, b in pairs]}
    ratios = {f"{clock}_ratio": quantiles([a / b for a, b in found], n=4) for clock, found in clocks.items()}
    return {"blocks": blocks, "step_ms": 1e3 * median(b.wall_s for _, b in pairs) / STEPS, **ratios}


@dataclass(frozen=True)
class Took:
    """Seconds of a block: on the clock, and of this thread on its core, which others' work does not lengthen."""

    wall_s: float
    cpu_s: float


def _block(matrix: torch.Tensor, odometer: Odometer | None) -> Took:
    """Of STEPS steps."""
    began, cpu = time.perf_counter(), time.thread_time()
    for _ in range(STEPS):
        start = time.perf_counter()
        matrix @ matrix
        done = _done(time.perf_counter() - start)
        if odometer:
            odometer.add(done)
    return Took(time.perf_counter() - began, time.thread_time() - cpu)


def _done(step_s: float) -> StepDone:
    return StepDone(0, 0, 0, 0.1, cast(Any, None), 0, (), 0.0, step_s, 0)


if __name__ == "__main__":
    edge.run(main)
