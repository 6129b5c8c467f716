"""How dimensions are written: 18,34 | 0.01:1.0:log | 0.01:1.0:log:5 | a YAML file, which knows conditions as well.

    model.depth: [18, 34]
    optim.lr: {low: 0.01, high: 1.0, log: true}        # points: 5 makes a list of it
    train.global_batch: {by: model.depth, 18: 256, 34: [64, 128]}

Flags and file are read alike: every value is text first, and the swept setting's type decides what it means.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from orchestrator.config import HORIZON, IDENTITY, RunConfig, kinds
from orchestrator.settings import unknown
from orchestrator.sweep.space import By, Dimension, Range, Value, Values
from pipelines.errors import ConfigError

SHORT = {"depth": "model.depth", "lr": "optim.lr"}
NUMBERS = (int, float)
HOW_LONG = "train.epochs"  # no identity, but worth a dimension
FORMS = "a range is low:high or low:high:log, with a number of points behind it for a list: 0.01:1.0:log:5"


def full_name(given: str, others: Iterable[str] = ()) -> str:
    """'lr' or 'train.global-batch' -> the dotted name. Raises ConfigError for what is no setting or cannot be swept.

    others: names that are no settings and may have been meant.
    """
    name = given.replace("-", "_")
    name = SHORT.get(name, name)
    kind = kinds().get(name)
    if kind is None:
        raise ConfigError(unknown(given, [*others, *SHORT, *sweepable()], "sweep."))
    if kind != IDENTITY and name != HOW_LONG:
        why = "what is kept and told" if kind == HORIZON else "where a run is and how fast"
        how = "--sweep.workers 18=1,50=2 sets it by depth" if name == "cluster.workers" else _once(name)
        raise ConfigError(f"sweep.{name} cannot be swept: it says {why}, not what is trained; {how}")
    if name not in sweepable():
        raise ConfigError(f"sweep.{name} cannot be swept: numbers, switches and choices can; {_once(name)}")
    return name


def sweepable() -> list[str]:
    """The settings that say what is trained, and how long, and are a number, a switch or a choice."""
    known = [name for name, kind in kinds().items() if kind == IDENTITY or name == HOW_LONG]
    return [name for name in known if _type(name) in (*NUMBERS, bool) or get_origin(_type(name)) is Literal]


def named(given: Iterable[tuple[str, Any]], others: Iterable[str] = ()) -> dict[str, Dimension]:
    """Names as they were given, and text or YAML -> dimensions by dotted name. Raises ConfigError."""
    found: dict[str, Dimension] = {}
    for short, node in given:
        name = full_name(short, others)
        if name in found:
            raise ConfigError(f"sweep.{name} is given twice; say all its values at once")
        found[name] = dimension(name, node)
    return found


def from_file(path: Path) -> dict[str, Dimension]:
    """The dimensions in a YAML file. Raises ConfigError."""
    try:
        # The loader that leaves every scalar as it is written: YAML's own reading makes 512 of 8:32, and text of 1e-1.
        nodes = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"sweep.space is {path}, which cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(nodes, dict) or not all(isinstance(name, str) for name in nodes):
        raise ConfigError(
            f"sweep.space is {path}, which holds no dimensions; lines such as 'model.depth: [18, 34]' are"
        )
    return named(nodes.items())


def dimension(name: str, node: Any) -> Dimension:
    """Text, or what a YAML file has for the dimension -> the dimension. Raises ConfigError."""
    if isinstance(node, dict) and "by" in node:
        return _by(name, node)
    return _plain(name, node)


def _by(name: str, node: dict[str, Any]) -> By:
    other = full_name(str(node["by"]))
    cases = [(_value(other, key), _plain(name, case)) for key, case in node.items() if key != "by"]
    if len(dict(cases)) < len(cases):
        raise ConfigError(f"sweep.{name} has two cases for one value of {other}; leave one of them out")
    return By(other, tuple(cases))


def _plain(name: str, node: Any) -> Values | Range:
    match node:
        case str() if ":" in node:
            return _range(name, node)
        case str():
            return _list(name, node.split(",") if node.strip() else [])
        case list():
            return _list(name, node)
        case {"low": str(low), "high": str(high), **more} if set(more) <= {"log", "points"}:
            log = _as(bool, f"sweep.{name}: log", more.get("log", "false"))
            points = [str(more["points"])] if "points" in more else []
            return _range(name, ":".join([low, high, *["log"] * log, *points]))
    raise ConfigError(
        f"sweep.{name} is {node!r}; a list, {{low: 0.01, high: 1.0, log: true}}, or {{by: model.depth, 18: 256}} is "
        "meant"
    )


def _list(name: str, items: list[Any]) -> Values:
    if not items or any(isinstance(item, str) and not item.strip() for item in items):
        raise ConfigError(f"sweep.{name} is empty, or has an empty value; list them as in --sweep.depth 18,34,50")
    values = tuple(_value(name, item) for item in items)
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ConfigError(f"sweep.{name} has the value {items[i]} twice; leave one out")
    return Values(values)


def _range(name: str, written: str) -> Values | Range:
    """low:high[:log][:points]."""
    low_text, high_text, *rest = (part.strip() for part in written.split(":"))
    log = rest[:1] == ["log"]
    points = rest[log:]
    if len(points) > 1 or not all(p.isdecimal() for p in points):
        raise ConfigError(f"sweep.{name} is '{written}'; {FORMS}")
    if _type(name) not in NUMBERS:
        raise ConfigError(f"sweep.{name} is '{written}'; a range is for numbers: list the values that are meant")
    low, high = _end(name, written, low_text), _end(name, written, high_text)
    if low >= high:
        raise ConfigError(f"sweep.{name} is '{written}', an empty range; the first number must be below the second")
    if log and low <= 0:
        raise ConfigError(
            f"sweep.{name} is '{written}'; a log range cannot touch zero: start above it, or leave ':log' out"
        )
    found = Range(low, high, log, whole=_type(name) is int)
    return _spread(name, written, found, int(points[0])) if points else found


def _spread(name: str, written: str, found: Range, points: int) -> Values:
    if not 2 <= points <= found.size:
        most = "" if math.isinf(found.size) else f" and at most {found.size}"
        raise ConfigError(f"sweep.{name} is '{written}' with {points} points; at least 2{most} are needed")
    spread = found.spread(points)
    if len(set(spread.values)) < points:
        raise ConfigError(f"sweep.{name} is '{written}', whose points fall together: {spread}; ask for fewer")
    return spread


def _end(name: str, written: str, part: str) -> float:
    """One end of a range, an int for a whole-number setting."""
    value = float(_as(float, f"sweep.{name} is '{written}'; its end", part))
    if not math.isfinite(value):
        raise ConfigError(f"sweep.{name} is '{written}'; both ends must be finite numbers")
    if _type(name) is not int:
        return value
    if value != int(value):
        raise ConfigError(f"sweep.{name} is '{written}'; {name} is a whole number, so both ends must be")
    return int(value)


def _value(name: str, item: Any) -> Value:
    value = _as(_type(name), f"sweep.{name}: a value", item.strip() if isinstance(item, str) else item)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"sweep.{name}: a value is '{item}'; finite numbers are needed")
    return value


def _as(kind: Any, what: str, item: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(item)
    except ValidationError as error:
        said = error.errors()[0]["msg"].replace("Input should be", "it should be")
        raise ConfigError(f"{what} is {item!r}; {said}") from error


def _type(name: str) -> Any:
    """What a setting holds: int, float, bool, a Literal, or something that cannot be swept."""
    section, _, last = name.partition(".")
    return RunConfig.model_fields[section].annotation.model_fields[last].annotation  # type: ignore[union-attr]


def _once(name: str) -> str:
    return f"set --{name} once, for all trials"
