"""What a sweep cost beyond the training of its trials. Pure arithmetic."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import ClusterError

OURS = "skiplane"
Bare = Mapping[str, Any]  # of a trial: point, seconds, cpu_s, top1 of each epoch


@dataclass(frozen=True)
class Trial:
    """What MLflow knows of a trial: top-1 and time (seconds since 1970) of each epoch's end."""

    point: dict[str, str]
    top1: list[float]
    ends: list[float]


@dataclass(frozen=True)
class Turn:
    """A sweep, from its command (seconds since 1970) to its end."""

    began: float
    wall_s: float
    cpu_s: float
    trials: list[Trial]


def figures(turn: Turn, bare: Sequence[Bare], concurrent: int) -> dict[str, Any]:
    """Of one sweep. Raises ClusterError where it did not train what was trained bare."""
    alone = {json.dumps(trial["point"], sort_keys=True): trial for trial in bare}
    found = {json.dumps(trial.point, sort_keys=True): trial for trial in turn.trials}
    wrong = [point for point, trial in found.items() if trial.top1 != alone[point]["top1"][: len(trial.top1)]]
    if wrong or set(found) != set(alone):
        raise ClusterError(f"not the same was trained: {wrong or set(found) ^ set(alone)}")
    share = {point: len(found[point].top1) / len(trial["top1"]) for point, trial in alone.items()}
    training_s = sum(alone[point]["seconds"] * part for point, part in share.items())
    training_cpu_s = sum(alone[point]["cpu_s"] * part for point, part in share.items())
    return {
        "wall_s": turn.wall_s, "cpu_s": turn.cpu_s, "epochs": sum(len(trial.top1) for trial in turn.trials),
        "training_s": training_s, "training_cpu_s": training_cpu_s,
        "overhead_s": (turn.wall_s * concurrent - training_s) / len(bare),
        "cpu_overhead_s": (turn.cpu_s - training_cpu_s) / len(bare), **stretches(turn),
    }  # fmt: skip


def stretches(turn: Turn) -> dict[str, float]:
    """Where the seconds go; the first three add up to all of them."""
    ends = [end for trial in turn.trials for end in trial.ends]
    return {
        "until_first_epoch_s": min(ends) - turn.began,
        "first_to_last_epoch_s": max(ends) - min(ends),
        "after_last_epoch_s": turn.began + turn.wall_s - max(ends),
        "inside_trials_s": sum(trial.ends[-1] - trial.ends[0] for trial in turn.trials),
    }


def against(rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, dict[str, dict[str, float]]]:
    """Case -> figure -> ours divided by the way's, round by round: median, least and most."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        ours, its = ([row for row in rows if (row["case"], row["way"]) == (case, name)] for name in (OURS, way))
        found[case] = {
            name: _spread([a[name] / b[name] for a, b in zip(ours, its, strict=True)])
            for name in ("overhead_s", "cpu_overhead_s", "wall_s", "cpu_s")
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
