"""What is left of a sweep without a cluster: its trials, trained one after the other in this process.

    python -m benchmarks.bare FLAGS

FLAGS are those of jobs.sweep with a grid. The last line is JSON: of each trial its point, seconds, CPU seconds (those
of DALI's threads, too), and the top-1 of each epoch. A first epoch, before anything is measured, loads what is loaded
at first use: that is overhead of whoever starts processes.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jobs import edge
from orchestrator import settings
from orchestrator.config import RunConfig
from orchestrator.context import LocalContext
from orchestrator.sweep.runs import known_points, trial_config, trial_id
from orchestrator.sweep.settings import load
from orchestrator.worker import Job, train


def main(argv: list[str]) -> int:
    """Exit codes: 0 trained, 2 setting, 3 data, 5 a loss that is not finite."""
    own = settings.parser("Trains a sweep's trials without a cluster.", "python -m benchmarks.bare FLAGS")
    _, config, sweep, space = load(argv, own, settings.Edge.of_environment())
    torch.set_num_threads(config.cluster.cpus_per_worker)
    with tempfile.TemporaryDirectory(prefix="skiplane-bare-") as folder:
        base = config.replace({"cluster.storage": folder})
        points = known_points(space, sweep)
        trials = [trial_config(base, sweep, trial_id(number), point) for number, point in enumerate(points, start=1)]
        timed(trials[0].replace({"name": "first", "train.stop_after": 1}))
        said = [{name: str(value) for name, value in point.items()} for point in points]
        edge.say(json.dumps([{"point": point, **timed(trial)} for point, trial in zip(said, trials, strict=True)]))
    return 0


def timed(config: RunConfig) -> dict[str, Any]:
    """A run from its first line to its last checkpoint."""
    Path(config.folder()).mkdir(parents=True)
    began, used = time.perf_counter(), time.process_time()
    summary = train(Job(config), LocalContext())
    return {
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - used,
        "top1": [epoch["val_top1"] for epoch in summary["curve"]],
    }


if __name__ == "__main__":
    edge.run(main)
