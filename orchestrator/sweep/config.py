"""A sweep's own settings: how trials are chosen, stopped and placed. Frozen and checked at birth, as a run's are."""

from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator, model_validator

from orchestrator.config import HORIZON, IDENTITY, PLACEMENT, ClusterConfig, Section, kinds, setting
from orchestrator.sweep.space import MUTABLE, Range, Space, size, text
from orchestrator.sweep.trial import METRICS
from pipelines.errors import ConfigError

MOST_TRIALS = 10_000
_WORKERS = "is '{}'; a number or least..most is needed, such as 2 or 1..2, or one for each depth: 18=1,50=2..4"


class SweepConfig(Section):
    """How trials are chosen, stopped and placed."""

    search: Literal["auto", "grid", "random", "tpe", "pbt"] = setting(
        "auto",
        IDENTITY,
        "grid (every point) | random | tpe (Optuna, learns from trials) | pbt (poor trials take up good ones and "
        "change the rate); auto = grid where all dimensions are lists, else random",
    )
    trials: int = setting(0, IDENTITY, "trials in all; 0 = every point of the grid", ge=0, le=MOST_TRIALS)
    stop: Literal["none", "asha", "median"] = setting(
        "asha",
        IDENTITY,
        "asha (one in so many survives a rung) | median (below the median of the others) | none; pbt: none",
    )
    grace: int = setting(1, IDENTITY, "epochs that every trial trains before any is stopped", ge=1)
    factor: float = setting(
        3.0, IDENTITY, "of asha: one in so many survives a rung, and the next is so many times as far", gt=1, le=100
    )
    metric: str = setting("val/top1", IDENTITY, f"what trials are judged by: {', '.join(METRICS)}")
    seed: int = setting(0, IDENTITY, "of the search; train.seed is the trials' own", ge=0, lt=2**32)
    interval: int = setting(1, IDENTITY, "of pbt: epochs between exploits", ge=1)
    concurrent: int = setting(0, PLACEMENT, "trials at once; 0 = as many as the cluster holds", ge=0)
    max_failures: int | None = setting(
        None, HORIZON, "the sweep ends when more trials than this have failed; not set = it goes on without them", ge=0
    )
    workers: str = setting("", PLACEMENT, "workers of a trial, 2 or 1..2, or by depth 18=1,50=2..4; default as the run")
    space: str = setting("", PLACEMENT, "YAML file of dimensions, see README; flags add to it and win")

    @model_validator(mode="before")
    @classmethod
    def _nothing_stops_pbt(cls, values: Any) -> Any:
        return {"stop": "none"} | values if isinstance(values, dict) and values.get("search") == "pbt" else values

    @field_validator("metric")
    @classmethod
    def _reported(cls, value: str) -> str:
        if value not in METRICS:
            raise ValueError(f"is '{value}', which no trial reports; use one of {', '.join(METRICS)}")
        return value

    @field_validator("workers")
    @classmethod
    def _groups(cls, value: str) -> str:
        try:
            for group in _by_depth(value).values() if "=" in value else [value] * bool(value):
                ClusterConfig(workers=group)
        except ValidationError:
            raise ValueError(_WORKERS.format(value)) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.search == "pbt" and self.stop != "none":
            raise ValueError(
                f"sweep.stop is {self.stop} with sweep.search pbt, where poor trials take up good ones and go "
                "on; leave --sweep.stop out"
            )
        return self

    @property
    def by_depth(self) -> dict[int, str]:
        """Depth -> cluster.workers; empty where all trials have the same."""
        return _by_depth(self.workers)

    def workers_of(self, depth: int, default: str) -> str:
        """cluster.workers of a trial of this depth; `default` where nothing is said of it."""
        return self.by_depth.get(depth, default) if self.by_depth else self.workers or default


def settled(sweep: SweepConfig, space: Space) -> SweepConfig:
    """The same with what 'auto' and 0 trials mean for this space. Raises ConfigError where the two do not fit."""
    search = sweep.search if sweep.search != "auto" else "grid" if space.listed else "random"
    points = size(space)
    trials = _of_grid(sweep, space, points or 0) if search == "grid" else _drawn(sweep, search, points)
    if search == "pbt":
        changing(space)
    _refuse_other_depths(sweep, space)
    return SweepConfig.model_validate(sweep.model_dump() | {"search": search, "trials": trials})


def changing(space: Space) -> str:
    """The one setting that pbt changes while trials train. Raises ConfigError for a space where that cannot be."""
    if "train.epochs" in space.dimensions:
        raise ConfigError(
            "sweep.search is pbt, where trials take up each other's state and so train for equally many epochs; take "
            "train.epochs out of the space"
        )
    ranges = [name for name in space.dimensions if any(isinstance(part, Range) for part in space.parts(name))]
    if len(ranges) != 1 or not isinstance(space.dimensions.get(ranges[0]), Range) or ranges[0] not in MUTABLE:
        raise ConfigError(
            f"sweep.search is pbt, which needs exactly one range, of {' or '.join(MUTABLE)}, and lists besides; "
            f"this space has {', '.join(ranges) or 'none'}"
        )
    return ranges[0]


def _of_grid(sweep: SweepConfig, space: Space, points: int) -> int:
    if not space.listed:
        line = next(f"{n} {p}" for n in space.dimensions for p in space.parts(n) if isinstance(p, Range))
        raise ConfigError(
            f"sweep.search is grid, and {line} is a range; put a number of points behind it, such as 0.01:1.0:log:5, "
            "or use --sweep.search random"
        )
    if points > MOST_TRIALS:
        raise ConfigError(f"the grid has {points} points, more than {MOST_TRIALS}; use --sweep.search random or tpe")
    if sweep.trials > points:
        raise ConfigError(f"sweep.trials is {sweep.trials}, more than the {points} points of the grid; leave it out")
    if 0 < sweep.trials < points:
        raise ConfigError(
            f"sweep.trials is {sweep.trials}, fewer than the {points} points of the grid; leave it out for all, or use "
            "--sweep.search random for some of them"
        )
    return points


def _drawn(sweep: SweepConfig, search: str, points: int | None) -> int:
    least = 2 if search == "pbt" else 1
    if sweep.trials < least:
        raise ConfigError(
            f"sweep.trials is {sweep.trials or 'not set'}; search {search} needs to know how many, at least {least}"
        )
    if points is not None and sweep.trials > points:
        raise ConfigError(
            f"sweep.trials is {sweep.trials}, more than the {points} points of the space; ask for {points} at most"
        )
    return sweep.trials


def _refuse_other_depths(sweep: SweepConfig, space: Space) -> None:
    swept = [v for part in space.parts("model.depth") for v in part.ends] if "model.depth" in space.dimensions else []
    if other := [depth for depth in sweep.by_depth if depth not in swept]:
        raise ConfigError(
            f"sweep.workers is {sweep.workers}, and depth {other[0]} is not swept; depths here: "
            f"{', '.join(map(text, swept)) or 'one, so a number such as 2 is enough'}"
        )


def identity(space: Space, sweep: SweepConfig) -> dict[str, Any]:
    """What a sweep's name stands for, ready for JSON: its space as text, and what chooses and stops trials."""
    fixed = {name: getattr(sweep, name) for name, kind in kinds(SweepConfig).items() if kind == IDENTITY}
    return {"space": space.lines(), **fixed}


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps one `identity` from going on under the name of another, one line each."""
    return [
        f"sweep.{name} was {_shown(old.get(name))}, is {_shown(value)}"
        for name, value in new.items()
        if old.get(name) != value
    ]


def _shown(value: Any) -> str:
    return " | ".join(value) if isinstance(value, list) else str(value)


def _by_depth(value: str) -> dict[int, str]:
    """'18=1,50=2..4' -> {18: "1", 50: "2..4"}; empty for '2'. Raises ValueError."""
    if "=" not in value:
        return {}
    groups: dict[int, str] = {}
    for item in value.split(","):
        depth, equals, group = item.strip().partition("=")
        if not (depth.isdecimal() and equals and group) or int(depth) in groups:
            raise ValueError(_WORKERS.format(value))
        groups[int(depth)] = group
    return groups
