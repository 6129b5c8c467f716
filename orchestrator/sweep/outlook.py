"""What a sweep will do and how long it will take, from trials, plans and measured speeds: what `--dry-run` shows."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from orchestrator.config import RunConfig
from orchestrator.plan import Counts, Plan, lanes_of, learning_rate, make_plan
from orchestrator.sweep.config import SweepConfig, changing
from orchestrator.sweep.runs import likely_points, title, trial_config, trial_id
from orchestrator.sweep.space import Space
from orchestrator.training.models.arch import Arch
from pipelines.errors import ConfigError

if TYPE_CHECKING:  # torch takes a second, and a refusal should not
    from orchestrator.training.reduce import Way
    from orchestrator.training.step import Precision

# Measured by benchmarks.sweep on two cores: until the first trials train; and of each trial besides its training.
START_S, OVERHEAD_S = 20.0, 2.0
SHOWN = 40  # trials
DAY_S = 86_400
Planned = tuple[RunConfig, Plan]


@dataclass(frozen=True)
class Work:
    """What the time of a worker's step, and of its evaluation, depends on."""

    arch: Arch
    lanes: int  # of the fullest worker
    micro_batch: int
    size: int  # px
    eval_size: int
    eval_batch: int
    lanes_per_pass: int = 0
    reduce: "Way" = "fast"
    precision: "Precision" = "fp32"
    channels_last: bool = False


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, and of one evaluation image."""

    step: float
    image: float


@dataclass(frozen=True)
class Probe:
    """Measured speeds, and where: "this machine's CPU, 1 thread"."""

    speeds: Mapping[Work, Speed]
    where: str


def planned(base: RunConfig, sweep: SweepConfig, space: Space, counts: Counts) -> list[Planned]:
    """Settings and plan of each trial that is certain; for tpe of as many random ones. Raises ConfigError."""
    trials = []
    for number, point in enumerate(likely_points(space, sweep), 1):
        config = trial_config(base, sweep, trial_id(number), point)
        try:
            plan = make_plan(config, counts)
            learning_rate(config, plan.steps_per_epoch)
        except ConfigError as error:
            raise ConfigError(f"trial {title(config, space)}: {error}") from error
        trials.append((config, plan))
    return trials


def work_of(config: RunConfig, plan: Plan, workers: int) -> Work:
    """What each of so many workers does."""
    data, train = config.data, config.train
    return Work(
        arch=config.model.arch(plan.classes),
        lanes=len(lanes_of(0, workers, data.lanes)),
        micro_batch=plan.micro_batch,
        size=data.size,
        eval_size=data.eval_size,
        eval_batch=data.eval_batch,
        lanes_per_pass=train.lanes_per_pass,
        reduce=train.reduce,
        precision=train.precision,
        channels_last=train.channels_last,
    )


def works(trials: Sequence[Planned]) -> list[Work]:
    """All kinds of work in the trials, with the least and the most workers; each once."""
    return list(dict.fromkeys(work_of(c, plan, workers) for c, plan in trials for workers in c.cluster.span))


def rungs(sweep: SweepConfig, epochs: int) -> list[float]:
    """Epochs after which asha stops trials that have so many to train: 1, 3, 9, ... below the end."""
    marks = [float(sweep.grace)] if sweep.stop == "asha" else []
    while marks and marks[-1] * sweep.factor < epochs:
        marks.append(marks[-1] * sweep.factor)
    return [mark for mark in marks if mark < epochs]


def least_epochs(sweep: SweepConfig, epochs: int) -> float:
    """Of a trial, in the mean: asha lets one in `factor` pass each rung; with median half go on behind the grace."""
    if sweep.stop == "median":
        return min(sweep.grace, epochs) + max(epochs - sweep.grace, 0) / 2
    marks = [0.0, *rungs(sweep, epochs), float(epochs)]
    return sum((end - start) / sweep.factor**i for i, (start, end) in enumerate(pairwise(marks)))


def seconds(trial: Planned, probe: Probe, workers: int, epochs: float) -> float:
    """Of one trial: steps at the pace of the fullest worker, evaluations shared by all, and a constant."""
    config, plan = trial
    speed = probe.speeds[work_of(config, plan, workers)]
    scoring = plan.val_samples / workers * speed.image / config.train.eval_epochs
    return epochs * (plan.steps_per_epoch * speed.step + scoring) + OVERHEAD_S


def estimate(trials: Sequence[Planned], probe: Probe, concurrent: int, sweep: SweepConfig) -> tuple[float, float]:
    """(least, most) seconds of the sweep with so many trials at once.

    Most: every trial trains to its end with its least workers. Least: with its most workers, and only `least_epochs` of
    it in the mean; but one of them to the end.
    """
    most = [seconds(t, probe, t[0].cluster.span[0], t[0].train.epochs) for t in trials]
    whole = [seconds(t, probe, t[0].cluster.span[1], t[0].train.epochs) for t in trials]
    least = [seconds(t, probe, t[0].cluster.span[1], least_epochs(sweep, t[0].train.epochs)) for t in trials]
    return max(makespan(least, concurrent), min(whole)), makespan(most, concurrent)


def makespan(durations: Sequence[float], slots: int) -> float:
    """When the last ends, if each begins in its order as soon as one of the slots is free."""
    free = [0.0] * slots
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def describe(base: RunConfig, sweep: SweepConfig, space: Space, trials: Sequence[Planned], probe: Probe) -> str:
    """The sweep as text for a person; `trials` are those of `planned`, `probe` has all their `works`."""
    rows = {
        "sweep": [f"{base.name}: {sweep.trials} trials, search {sweep.search}, judged by {sweep.metric}"],
        "space": space.lines(),
        "stopping": [_stopping(sweep, trials)],
        "trials": _trials(sweep, space, trials),
        "time": _time(sweep, trials, probe),
    }
    return "\n".join(
        f"{name if i == 0 else '':<11}{line}" for name, part in rows.items() for i, line in enumerate(part)
    )


def _stopping(sweep: SweepConfig, trials: Sequence[Planned]) -> str:
    if sweep.search == "pbt":
        return "none: poor trials take up good ones"
    epochs = max(config.train.epochs for config, _ in trials)
    if sweep.stop == "median":
        return f"median: after {_epochs(sweep.grace)} a trial ends that is below the median of the others so far"
    if not (marks := rungs(sweep, epochs)):
        return (
            "none" if sweep.stop == "none" else f"none: no rung from sweep.grace = {sweep.grace} below {epochs} epochs"
        )
    images = sorted({plan.steps_per_epoch * config.train.global_batch for config, plan in trials})
    seen = ", ".join(f"{round(mark * images[0]):,}" for mark in marks)
    return f"asha: one in {sweep.factor:g} goes on after {', '.join(f'{m:g}' for m in marks)} epochs ({seen} images)"


def _trials(sweep: SweepConfig, space: Space, trials: Sequence[Planned]) -> list[str]:
    if sweep.search == "tpe":
        return [f"{sweep.trials}, some at random, then each where those before it did well; workers {_workers(trials)}"]
    lines = [
        f"{config.name}  {title(config, space)}, {config.train.epochs} epochs = {plan.steps:,} steps, "
        f"workers {config.cluster.workers}"
        for config, plan in trials[:SHOWN]
    ]
    if len(trials) > SHOWN:
        lines.append(f"... and {len(trials) - SHOWN} more")
    if sweep.search == "pbt":
        lines.append(f"after every {_epochs(sweep.interval)} poor ones take up a good one and change {changing(space)}")
    return lines


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _workers(trials: Sequence[Planned]) -> str:
    """'1', or by depth: '18=1, 50=2..4'."""
    groups = {config.model.depth: config.cluster.workers for config, _ in trials}
    if len(set(groups.values())) == 1:
        return next(iter(groups.values()))
    return ", ".join(f"{depth}={workers}" for depth, workers in sorted(groups.items()))


def _span(seconds: float) -> str:
    """'1:05', or '12.5 days'."""
    from orchestrator.progress import clock  # which imports torch

    return clock(seconds) if seconds < 2 * DAY_S else f"{seconds / DAY_S:,.1f} days"


def _time(sweep: SweepConfig, trials: Sequence[Planned], probe: Probe) -> list[str]:
    at_once = sweep.concurrent or 1
    least, most = (START_S + each for each in estimate(trials, probe, at_once, sweep))
    shown = " to ".join(dict.fromkeys(map(_span, (least, most))))
    how = (
        f"{at_once} at once"
        if sweep.concurrent
        else "one after the other (sweep.concurrent is not set: at once, what the cluster holds)"
    )
    return [
        f"{shown} for all, {how}",
        f"steps and evaluation as measured on {probe.where}; decoding and sums over workers are left out; "
        f"{START_S:g} s are added, and {OVERHEAD_S:g} s a trial, for its start and end",
        *(["the nets that will be tried are not known: as many random ones are counted"] * (sweep.search == "tpe")),
        *(["less: if the rule stops all that it may"] * (sweep.stop != "none")),
    ]
