"""The settings of a trial as a recipe: a YAML file for --config, in sections as in jobs/recipes/."""

from collections.abc import Mapping
from typing import Any

import yaml

from orchestrator.config import IDENTITY, RunConfig, flatten, kinds, unflatten

EPOCHS = "train.epochs"  # part of what a schedule is
WIDTH = 120


def recipe(base: RunConfig, config: Mapping[str, Any], comment: str = "") -> str:
    """YAML of what fixes the weights: `base` with a trial's `config` (dotted names), where it is not the default.

    What a trial varied stands there in any case: it is the answer. Placement and reporting are left out, they belong
    to whoever trains. `comment` becomes its first lines.
    """
    default, kind = flatten(RunConfig()), kinds()
    chosen = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(base.replace(dict(config))).items()
        if (kind[name] == IDENTITY or name == EPOCHS) and (name in config or value != default[name])
    }
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + "".join(_section(name, values) for name, values in unflatten(chosen).items())


def _section(name: str, values: dict[str, Any]) -> str:
    return yaml.safe_dump({name: values}, default_flow_style=None, sort_keys=False, width=WIDTH)
