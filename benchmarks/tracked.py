"""What a way of tracking cost the thread that trained, and what the server has of it in the end. Pure arithmetic."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OURS = "skiplane"
RATIOS = ("call_us", "held_up_s", "step_to_bare")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """One run of one way.

    times: float64 [bare + steps, 2], seconds of each step and of reporting after it. points: the steps, from 1 on,
    after which one was reported. stored: metric -> the steps that the server has of it, doubles included.
    """

    times: "np.ndarray[Any, np.dtype[np.float64]]"
    bare: int
    points: list[int]
    stored: Mapping[str, Sequence[int]]
    errors: int  # calls that raised
    after_s: float  # from the last step until all was sent
    failed: bool = False  # it could not end its run


def figures(turn: Turn) -> dict[str, Any]:
    """Of one turn: the call of each point, all steps beside bare ones of the same process, and what arrived."""
    calls = turn.times[turn.bare + np.array(turn.points) - 1, 1]
    bare, steps = turn.times[: turn.bare].sum(1), turn.times[turn.bare :].sum(1)
    return {
        "points": len(turn.points),
        "call_us": 1e6 * float(np.median(calls)),
        "call_us_p95": 1e6 * float(np.percentile(calls, 95)),
        "call_us_greatest": 1e6 * float(calls.max()),
        "held_up_s": float(calls.sum()),
        "bare_ms": 1e3 * float(np.median(bare)),
        "step_to_bare": float(steps.mean() / bare.mean()),
        "median_step_to_bare": float(np.median(steps) / np.median(bare)),
        "lost": lost(turn),
        "doubled": sum(len(steps) - len(set(steps)) for steps in turn.stored.values()),
        "errors": turn.errors,
        "failed": int(turn.failed),
        "after_s": turn.after_s,
    }


def lost(turn: Turn) -> int:
    """Points of which the server has not got each metric."""
    whole = set.intersection(*(set(steps) for steps in turn.stored.values()))
    return len(set(turn.points) - whole)


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Case -> way -> figure -> median and quartiles over the rounds."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for row in rows:
        its = [other for other in rows if (other["case"], other["way"]) == (row["case"], row["way"])]
        numbers = [name for name, value in row.items() if isinstance(value, int | float)]
        found.setdefault(row["case"], {})[row["way"]] = {name: spread([r[name] for r in its]) for name in numbers}
    return found


def against(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Case -> way -> figure -> the way's divided by ours, round by round: median and quartiles."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    ours = {(row["case"], row["round"]): row for row in rows if row["way"] == OURS}
    for case, way in dict.fromkeys((row["case"], row["way"]) for row in rows if row["way"] != OURS):
        its = [row for row in rows if (row["case"], row["way"]) == (case, way)]
        pairs = [(row, ours[case, row["round"]]) for row in its if (case, row["round"]) in ours]
        if pairs:
            ratios = {name: spread([row[name] / our[name] for row, our in pairs]) for name in RATIOS}
            found.setdefault(case, {})[way] = ratios
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"low": low, "median": middle, "high": high}
