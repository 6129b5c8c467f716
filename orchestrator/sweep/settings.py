"""A sweep's own settings and its space, from flags: `--sweep.trials 12 --sweep.depth 18,34 --sweep.lr 0.01:1.0:log`.

A name that is no setting of the sweep is a dimension. All other flags are those of a run, and mean what all trials
have in common.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from orchestrator import settings
from orchestrator.config import RunConfig
from orchestrator.sweep import notation
from orchestrator.sweep.config import SweepConfig, settled
from orchestrator.sweep.runs import check
from orchestrator.sweep.space import Space
from pipelines.errors import ConfigError


class _Flags(BaseModel):
    """So that errors carry the flag's name."""

    sweep: SweepConfig


def load(
    argv: Sequence[str], own: argparse.ArgumentParser, edge: settings.Edge
) -> tuple[argparse.Namespace, RunConfig, SweepConfig, Space]:
    """The job's own flags, what all trials have in common, the sweep's settings and its space, all checked.

    The sweep's search is never "auto", and its trials are never 0. --help prints and exits. Raises ConfigError.
    """
    given, rest = _taken(argv)
    _document(own)
    args, base = settings.load(rest, own, edge)
    if not base.name:
        raise ConfigError("name is not set; give the sweep a --name: the same name goes on with the same sweep")
    if base.train.stop_after:
        raise ConfigError(
            f"train.stop_after is {base.train.stop_after}; a sweep parts its trials itself: leave it out, or lower "
            f"train.epochs"
        )
    fields = SweepConfig.model_fields
    try:
        sweep = _Flags.model_validate({"sweep": {n: v for n, v in given.items() if n in fields}}).sweep
    except ValidationError as error:
        raise ConfigError(settings.sentences(error)) from error
    space = read(sweep.space, [(name, written) for name, written in given.items() if name not in fields])
    sweep = settled(sweep, space)
    check(base, sweep, space)
    return args, base, sweep, space


def read(file: str, given: Sequence[tuple[str, str]]) -> Space:
    """The space of a file ("" for none) and of flags, which add to it and win. Raises ConfigError."""
    below = notation.from_file(Path(file)) if file else {}
    return Space(below | notation.named(given, SweepConfig.model_fields))


def _taken(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """--sweep.NAME VALUE and --sweep.NAME=VALUE taken out of argv; names with underscores."""
    given: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        found = re.fullmatch(r"--sweep\.([^=]*)(?:=(.*))?", word, re.DOTALL)
        if found is None:
            rest.append(word)
            continue
        name = found[1].replace("-", "_")
        value = found[2] if found[2] is not None else next(words, "--")
        if value.startswith("--"):
            raise ConfigError(f"sweep.{found[1]} has no value; give --sweep.{found[1]} VALUE")
        if name in given:
            raise ConfigError(f"sweep.{name} is given twice; say all its values at once")
        given[name] = value
    return given, rest


def _document(own: argparse.ArgumentParser) -> None:
    """The sweep's flags in the job's --help; `_taken` has them before the parser sees any."""
    group = own.add_argument_group("sweep", SweepConfig.__doc__)
    for name, field in SweepConfig.model_fields.items():
        default = "" if field.default in ("", None) else f" (default {field.default})"
        words = f"{field.description}{default}".replace("%", "%%")
        group.add_argument(f"--sweep.{name}", default=argparse.SUPPRESS, metavar=name.upper(), help=words)
    words = "a dimension: 18,34 | 0.01:1.0 | 0.01:1.0:log | 0.01:1.0:log:5; --sweep.depth and --sweep.lr are short"
    group.add_argument("--sweep.SECTION.SETTING", default=argparse.SUPPRESS, metavar="VALUES", help=words)
