"""What is submitted to a cluster: the command and its name, and the environment that it brings along. Pure.

Everybody who has the cluster's token can read a job's command and environment back: a secret is refused.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from pipelines.errors import ConfigError

RUNS = ("train", "study", "sweep")  # have a --name, and go on with what it names
COMMANDS = (*RUNS, "evaluate", "pack", "tracking")
TRACKING = "MLFLOW_TRACKING_URI"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
# Names of secrets by their words, after those that only sound alike are out: MAX_TOKENS, SORT_KEY and MONKEY are none.
HARMLESS = r"\b(SORT|PRIMARY|FOREIGN|PUBLIC|PARTITION|GROUP|CACHE|LABEL|IMAGE) KEYS?\b|\b(PAD|MASK|EOS|BOS) TOKEN\b"
SECRET = (
    r"\b(TOKEN|(API|AUTH|ACCESS) TOKENS|\w*PASSWORDS?|PASSWDS?|PASSPHRASES?|SECRETS?|CREDENTIALS?|CREDS|(API)?KEYS?)\b"
    r"|\b(PASS|PAT|\w+ PWD|CONNECTION STRING)$"
)
INSTEAD = (
    "set it in the environment of `ray start` on the nodes (from a file of mode 0600 outside of the repository: "
    "infra/start.sh reads ~/.skiplane/secrets.env; or a Kubernetes secret), or pass the path of a file that lies there "
    "(NAME_FILE or NAME_PATH)"
)


@dataclass(frozen=True)
class RuntimeEnv:
    """What a job brings along, as a runtime-env file says it: `rest` is for Ray alone."""

    excludes: tuple[str, ...] = ()
    env_vars: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Submission:
    """A command for a cluster. name: of its run, or the id that it was given; id: of its first job."""

    name: str
    id: str
    command: tuple[str, ...]
    environment: RuntimeEnv
    metadata: dict[str, str]
    resources: dict[str, float]

    @property
    def entrypoint(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.command)


def check_command(command: Sequence[str], id: str) -> str:
    """The name of what the command trains; the id where it trains nothing.

    Raises ConfigError for a command that is none of ours, that has no name, or that shows a password.
    """
    if not command:
        raise ConfigError("there is no command; it comes last, after --: jobs.submit -- python -m jobs.train --name a")
    if not (len(command) > 2 and command[0] in ("python", "python3") and command[1] == "-m" and _module(command)):
        raise ConfigError(
            f"the command is '{shlex.join(command)}'; it has to be python -m jobs.X with X one of "
            f"{', '.join(COMMANDS)} (for anything else there is `ray job submit --runtime-env infra/runtime-env.yaml`)"
        )
    if shown := next((word for word in command if _has_password(word)), ""):
        raise ConfigError(f"the command holds a password, in '{without_password(shown)}'; {INSTEAD}")
    name = _flag(command, "--name") if _module(command) in RUNS else id
    if not name:
        raise ConfigError(
            f"the command has no --name; give {command[2]} one: the same name goes on with the same run"
            if _module(command) in RUNS
            else f"{command[2]} names no run; say with --id what its job is called"
        )
    for setting, value in (("--name", name), ("--id", id or name)):
        if not re.fullmatch(NAME, value):
            raise ConfigError(f"{setting} is '{value}'; up to 100 letters, digits, '.', '_' and '-', no mark first")
    return name


def run_of(entrypoint: str) -> str:
    """The run that a job's entrypoint trains; empty where it trains none.

    >>> run_of("python -m jobs.train --recipe digits --name a")
    'a'
    """
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        return ""
    at = next((i for i, word in enumerate(words) if word == "-m" and _module(words[i - 1 :]) in RUNS), None)
    return "" if at is None else _flag(words[at:], "--name")


def next_id(base: str, used: Collection[str]) -> str:
    """The first of base, base-2, base-3 ... that no job had.

    >>> next_id("a", {"a", "a-2", "b"})
    'a-3'
    """
    number = 1
    while (id := base if number == 1 else f"{base}-{number}") in used:
        number += 1
    return id


def env_vars(asked: Sequence[str]) -> dict[str, str]:
    """--env NAME=VALUE, parsed. Raises ConfigError for another form, and for a secret."""
    found = dict[str, str]()
    for word in asked:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env is '{name}'; NAME=VALUE is needed")
        found[name] = value
    return check_open("--env", found)


def read_runtime_env(path: Path) -> RuntimeEnv:
    """A file as `ray job submit --runtime-env` takes it. Raises ConfigError where it cannot be used."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or "working_dir" in values:
        raise ConfigError(f"--runtime-env {path} has to be fields such as env_vars: and excludes:, without a "
                          f"working_dir: that is the repository")  # fmt: skip
    variables, excludes = values.pop("env_vars", None) or {}, values.pop("excludes", None) or []
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ConfigError(f"--runtime-env {path}: env_vars has to be names with texts; put numbers in quotes")
    if not isinstance(excludes, list) or not all(isinstance(line, str) for line in excludes):
        raise ConfigError(f"--runtime-env {path}: excludes has to be a list of patterns as in .gitignore")
    where = f"--runtime-env {path}:"
    return RuntimeEnv(tuple(excludes), check_open(where, variables), check_open(where, values))


def check_open(where: str, found: dict[str, Any]) -> dict[str, Any]:
    """The same, where no field and no text in it looks like a secret. Raises ConfigError."""
    for name, text in _texts("", found):
        assigned = re.findall(r"\b([A-Z][A-Z0-9_]*)=(?!=)", text)  # as in --env A=1
        if any(map(_secret, (name, *assigned))) or _has_password(text):
            raise ConfigError(f"{where} {name} looks like a secret, and whoever has the cluster's token can read a "
                              f"job's environment; {INSTEAD}")  # fmt: skip
    return found


def resources(text: str) -> dict[str, float]:
    """--resources, parsed. Raises ConfigError for anything but amounts by name."""
    try:
        found = json.loads(text or "{}")
        return {str(name): _amount(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"--resources is '{text}'; amounts by name are needed, as '{{\"driver\": 0.01}}'") from error


def tracking(shell: str, command: Sequence[str], asked: Collection[str], local: bool) -> tuple[dict[str, str], str]:
    """Where the job tracks, of what the submitting shell says: variables for it, and a line that says what was chosen.

    shell: its MLFLOW_TRACKING_URI. asked: variables that the job gets anyhow. An address of this machine means nothing
    on another one, and is passed only to its own cluster (`local`). Raises ConfigError for one with a password.
    """
    if _flag(command, "--tracking.uri") or TRACKING in asked or _module(command) not in (*RUNS, "tracking"):
        return {}, ""
    if not shell:
        return {}, f"{TRACKING} is not set here: it tracks where the cluster's own environment says"
    if _has_password(shell):
        raise ConfigError(f"{TRACKING} is {without_password(shell)}, with a password; {INSTEAD}")
    if local or not of_this_machine(shell):
        return {TRACKING: shell}, f"it tracks to {shell}: {TRACKING} of this shell"
    return {}, (f"{TRACKING} of this shell, {shell}, is this machine's and stays here: it tracks where the cluster's "
                f"own environment says (--env {TRACKING}=... names another)")  # fmt: skip


def of_this_machine(uri: str) -> bool:
    """Whether nobody else reaches it: a loopback address, or a file."""
    host = urlsplit(uri).hostname or ""
    return host in ("", "localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


def without_password(text: str) -> str:
    """A URL that can be shown."""
    return re.sub(r"(://)[^/@\s]*@", r"\1***@", text)


def _module(command: Sequence[str]) -> str:
    """'train' of python -m jobs.train ...; empty for anything else."""
    module = command[2].removeprefix("jobs.") if len(command) > 2 and command[2].startswith("jobs.") else ""
    return module if module in COMMANDS else ""


def _flag(command: Sequence[str], name: str) -> str:
    """A flag's value, the last one as everywhere; empty where there is none."""
    found = ""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        if word == name:
            found = after
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in it, however deep, and the field that it stands in."""
    if isinstance(value, dict):
        for field_name, inner in value.items():
            yield from _texts(str(field_name), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(name, inner)
    elif isinstance(value, str):
        yield name, value


def _secret(name: str) -> bool:
    words = re.sub(r"[^A-Z]+", " ", name.upper()).strip()
    return words.split(" ")[-1] not in ("FILE", "PATH", "DIR", "NAME") and bool(
        re.search(SECRET, re.sub(HARMLESS, "", words))
    )


def _has_password(text: str) -> bool:
    """In a URL; a user alone is one for HTTP, where tokens stand there. ${NAME} is none: pip reads it on the node."""
    text = re.sub(r"\$\{\w+\}", "", text)
    return bool(re.search(r"://[^/@\s:]*:[^/@\s]+@|https?://[^/@\s:]+@", text))


def _amount(value: Any) -> float:
    if isinstance(value, bool) or not float(value) > 0:
        raise ValueError(value)
    return float(value)
