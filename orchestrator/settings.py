"""Where settings come from: defaults, a recipe, a file, flags; the last one wins.

The flags are generated from RunConfig. The environment is read here, at the edge: SKIPLANE_HOME, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME, and whether this process is the driver of a Ray job. Only what lets in is read where it is used:
MLflow's user and password (tracking/access.py), the keys of buckets.
"""

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from orchestrator.config import RunConfig, absolute, flatten
from pipelines.errors import ConfigError

RECIPES = Path(__file__).parent.parent / "jobs" / "recipes"


@dataclass(frozen=True)
class Edge:
    """What a run may know of its surroundings."""

    home: Path  # $SKIPLANE_HOME
    tracking_uri: str = ""  # $MLFLOW_TRACKING_URI
    in_job: bool = False  # a relative path means nothing there: the working directory is Ray's unpacked package
    cwd: Path = field(default_factory=Path.cwd)
    experiment: str = ""  # $MLFLOW_EXPERIMENT_NAME

    @staticmethod
    def of_environment() -> "Edge":
        """Read once, at the start of a command."""
        home = Path(os.environ.get("SKIPLANE_HOME") or "~/.skiplane").expanduser().absolute()
        uri, experiment = (os.environ.get(name, "") for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"))
        return Edge(home, uri, "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ, experiment=experiment)


class Parser(argparse.ArgumentParser):
    """argparse that raises one sentence instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"unrecognized arguments: (\S+)", message)
        raise ConfigError(unknown(found[1].split("=")[0].lstrip("-")) if found else message)


class _Flags(RunConfig, BaseSettings):
    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_use_class_docs_for_groups=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # by default the shell's NAME=x would become the run's name


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """--recipe and --config: the sources that a job's own flags do not cover."""
    parser.add_argument("--recipe", help=f"named settings: {', '.join(recipe_names())}")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings in a file; they win over the recipe")


def parser(description: str, usage: str) -> argparse.ArgumentParser:
    """The parser every job adds its own flags to, before it is given to `load`."""
    made = Parser(description=description, usage=usage, allow_abbrev=False, add_help=False)
    made.add_argument("-h", "--help", action="store_true", help="show this, and every setting with unit and default")
    add_source_flags(made)
    return made


def load(argv: Sequence[str], own: argparse.ArgumentParser, edge: Edge) -> tuple[argparse.Namespace, RunConfig]:
    """Parses a job's own flags, then all settings.

    Two parsers, because the settings' one claims each section's bare name, such as --data. Returns the job's own
    namespace and the resolved, frozen configuration (absolute paths, no empty defaults); --help prints and exits.
    Raises ConfigError, one line for each wrong setting.
    """
    args, rest = own.parse_known_args(list(argv))
    flags = Parser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    try:
        source = CliSettingsSource(_Flags, root_parser=flags, cli_parse_args=rest)  # type: ignore[var-annotated]
        if args.help:
            print(own.format_help() + flags.format_help())
            raise SystemExit(0)
        merged = _merge(_merge(_recipe(args.recipe), _file(args.config)), dict(source()))
        return args, resolve(RunConfig.model_validate(merged), edge)
    except ValidationError as error:
        raise ConfigError(sentences(error)) from error
    except SettingsError as error:  # a section given as a whole, such as --data X
        raise ConfigError("a section's name alone is no setting: give --SECTION.SETTING VALUE (--help)") from error


def resolve(config: RunConfig, edge: Edge) -> RunConfig:
    """Fills what depends on the surroundings: places, tracking.uri, tracking.experiment."""
    changes = {
        "data.root": _url("data.root", config.data.root, READ)
        or _path("data.root", config.data.root, edge)
        or str(edge.home / "data" / config.data.name),
        "data.cache": _path("data.cache", config.data.cache, edge) or str(edge.home / "cache"),
        "cluster.storage": _url("cluster.storage", config.cluster.storage, WRITTEN)
        or _path("cluster.storage", config.cluster.storage, edge)
        or str(edge.home / "runs"),
        "model.init": _path("model.init", config.model.init, edge),
        "train.fork": _url("train.fork", config.train.fork, WRITTEN) or _path("train.fork", config.train.fork, edge),
        "tracking.uri": _tracking(config.tracking.uri or edge.tracking_uri) or f"sqlite:///{edge.home / 'mlflow.db'}",
        "tracking.experiment": config.tracking.experiment or edge.experiment or config.data.name,
    }
    return config.replace(changes)


def _tracking(uri: str) -> str:
    """The same address. Raises ConfigError for one with a password: settings are printed, and stand in run.json."""
    if re.match(r"[\w+.-]+://[^@]*:[^@]*@", uri):
        raise ConfigError(
            "tracking.uri (or MLFLOW_TRACKING_URI) holds a password, which would stand in logs and in run.json; leave "
            "user and password out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "~/.mlflow/credentials; for a database PGUSER and PGPASSWORD"
        )
    return uri


def recipe_names() -> list[str]:
    """The recipes that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def sentences(error: ValidationError) -> str:
    """A ValidationError as one line for each wrong setting: which, what it was, what is allowed."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(unknown(name))
        elif item["type"] == "value_error" and not isinstance(item["input"], str | int | float):
            lines.append(str(item["ctx"]["error"]))  # a rule over several settings names them itself
        else:
            lines.append(f"{name} {_what(item)}")
    return "\n".join(lines)


def _what(item: Any) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    message = item["msg"].replace("Input should be", "it should be").replace("String should", "it should")
    return f"is {item['input']!r}; {message}"


def unknown(name: str, known: Iterable[str] | None = None, prefix: str = "") -> str:
    """A name that is none of those known (None: the settings), with the nearest one; `prefix` stands before both."""
    near = difflib.get_close_matches(name, list(known or flatten(RunConfig())), n=1, cutoff=0.5)
    return f"{prefix}{name}: no such setting" + (
        f"; did you mean {prefix}{near[0]}?" if near else "; --help lists them all"
    )


def _recipe(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in recipe_names():
        raise ConfigError(f"recipe '{name}' does not exist; use one of {', '.join(recipe_names())}")
    return _file(RECIPES / f"{name}.yaml")


def _file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} holds no settings; sections such as 'model:' are expected")
    return values


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


WRITTEN = {"s3": "BUCKET", "gs": "BUCKET", "az": "CONTAINER"}
READ = WRITTEN | {"http": "HOST", "https": "HOST"}


def _url(name: str, value: str, schemes: Mapping[str, str]) -> str:
    """A URL with its bucket or host; empty for a local path."""
    if not re.match(r"[a-z0-9]+:/", value):
        return ""
    if not re.fullmatch(rf"({'|'.join(schemes)})://[^/?#@]+(/[^?#]*)?", value):
        shown = ", ".join(f"{scheme}://{host}/PATH" for scheme, host in schemes.items())
        raise ConfigError(f"{name} is '{re.sub('//[^/]*@', '//***@', value)}'; use a folder, or {shown}")
    return value.rstrip("/")


def _path(name: str, value: str, edge: Edge) -> str:
    if not value or "://" in value or Path(value).expanduser().is_absolute():
        return absolute(value, edge.cwd) if value else ""
    if edge.in_job:
        raise ConfigError(
            f"{name} is '{value}'; inside a submitted job a path must be absolute, because the job's working "
            f"directory is a temporary copy"
        )
    return absolute(value, edge.cwd)
