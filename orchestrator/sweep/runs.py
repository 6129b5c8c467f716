"""The run that a trial is: its settings, what people call it, and the flags that train it again."""

from collections.abc import Iterator

from pydantic import ValidationError

from orchestrator.config import RunConfig, flatten
from orchestrator.settings import sentences
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.space import DIGITS, By, Point, Space, draws, grid, text
from pipelines.errors import ConfigError


def trial_id(number: int) -> str:
    """1 -> 't001': the trial's name, and its run's."""
    return f"t{number:03d}"


def trial_config(base: RunConfig, sweep: SweepConfig, name: str, point: Point) -> RunConfig:
    """The run of one trial: `<storage>/<sweep>/<name>/`. Raises ConfigError, one line for each wrong setting."""
    depth = point.get("model.depth", base.model.depth)
    placed = {"name": name, "cluster.storage": base.folder()}
    try:
        return base.replace(point | placed | {"cluster.workers": sweep.workers_of(depth, base.cluster.workers)})
    except ValidationError as error:
        lines = sentences(error).splitlines()
        raise ConfigError("\n".join(f"trial {_pairs(point)}: {line}" for line in lines)) from error


def title(config: RunConfig, space: Space) -> str:
    """What differs, the net first: 'plain-18 width=32 lr=0.05'. A setting that the net's name says is left out."""
    flat, said = flatten(config), _said_by_name(space)
    pairs = _pairs({name: flat[name] for name in space.dimensions if name not in said})
    return f"{config.model.arch(classes=2).name} {pairs}".strip()


def groups(base: RunConfig, sweep: SweepConfig, space: Space) -> dict[int, str]:
    """Depth -> cluster.workers, of all depths that trials may have."""
    depths = {v for part in space.parts("model.depth") for v in part.ends} if "model.depth" in space.dimensions else ()
    return {int(d): sweep.workers_of(int(d), base.cluster.workers) for d in sorted(depths or {base.model.depth})}


def flags(point: Point) -> list[str]:
    """The settings of a trial for a command line: ['--model.depth', '34', '--optim.lr', '0.1']."""
    return [word for name, value in point.items() for word in (f"--{name}", text(value))]


def known_points(space: Space, sweep: SweepConfig) -> list[Point]:
    """The trials that are certain before any has run: of a grid, of a random search, of pbt at birth; none of tpe."""
    return [] if sweep.search == "tpe" else likely_points(space, sweep)


def likely_points(space: Space, sweep: SweepConfig) -> list[Point]:
    """The same; for tpe as many random ones, which stand for those that it will choose."""
    return grid(space) if sweep.search == "grid" else draws(space, sweep.seed, sweep.trials)


def check(base: RunConfig, sweep: SweepConfig, space: Space) -> None:
    """Refuses a space with a point that is no run, as far as `likely_points`, and each value or end of a range beside
    the others' first, show it; tpe and pbt may meet another one later. Raises ConfigError."""
    likely = likely_points(space, sweep)
    if len(likely) < sweep.trials:
        raise ConfigError(
            f"sweep.trials is {sweep.trials}, and with {DIGITS} digits the space has but {len(likely)} points; "
            f"widen a range, or ask for {len(likely)} at most"
        )
    if sweep.search == "pbt" and sweep.interval % base.train.eval_epochs:
        raise ConfigError(
            f"sweep.interval is {sweep.interval}, and train.eval_epochs = {base.train.eval_epochs} does not divide it, "
            f"so trials would have no score when pbt compares them; use a multiple, or train.eval_epochs 1"
        )
    corners = [] if sweep.search == "grid" else _corners(space)  # a grid's are among its points
    for point in [*corners, *likely]:
        trial_config(base, sweep, trial_id(1), point)


def _corners(space: Space) -> Iterator[Point]:
    for name, found in space.dimensions.items():
        if isinstance(found, By):
            pins = [{found.other: value, name: end} for value, case in found.cases for end in case.ends]
        else:
            pins = [{name: end} for end in found.ends]
        for pinned in pins:
            point: Point = {}
            for other in space.dimensions:
                point[other] = pinned[other] if other in pinned else space.at(other, point).ends[0]
            yield point


def _said_by_name(space: Space) -> set[str]:
    """model.depth always; model.shortcut where there is but one beside the plain net."""
    if "model.shortcut" not in space.dimensions:
        return {"model.depth"}
    kinds = {value for part in space.parts("model.shortcut") for value in part.ends} - {"none"}
    return {"model.depth"} | ({"model.shortcut"} if len(kinds) <= 1 else set())


def _pairs(values: Point) -> str:
    """'width=32 lr=0.05': no two settings that can be swept end alike."""
    return " ".join(f"{name.rpartition('.')[2]}={text(value)}" for name, value in values.items())
