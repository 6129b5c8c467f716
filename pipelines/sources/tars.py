"""WebDataset tars by path, wildcard, brace pattern or URL: which they are, and how large."""

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from braceexpand import braceexpand

from pipelines.dataset import ASKED_AT_ONCE
from pipelines.errors import ConfigError
from pipelines.remote.failures import StoreError
from pipelines.remote.objects import Objects
from pipelines.remote.store import Store
from pipelines.remote.url import is_url, split_url

BUCKETS = ("s3://", "gs://", "az://")  # what can be listed
WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Tar:
    """where: its path or URL. name: what dataset.json calls it."""

    where: str
    name: str
    size: int


def find_tars(flag: str, patterns: Sequence[str], out: str, endpoint: str = "") -> tuple[Tar, ...]:
    """The tars that the patterns name, in their order; wildcards in sorted order.

    out: the dataset's place; what lies there is named without its folder. Raises ConfigError where a pattern names
    nothing, or a tar twice, or cannot be followed; DataError where one is not there.
    """
    found = [where for pattern in patterns for where in _expand(flag, pattern, endpoint)]
    if twice := [where for where, count in Counter(found).items() if count > 1]:
        raise ConfigError(f"{flag} names {twice[0]} twice; each tar counts once")
    objects = Objects(endpoint)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        sizes = list(pool.map(objects.size, found))
    return tuple(Tar(where, _name(flag, where, out), size) for where, size in zip(found, sizes, strict=True))


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line. Raises ConfigError."""
    try:
        names = tuple(line.strip() for line in path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes {path} cannot be read: {error}") from error
    if not names or "" in names or len(set(names)) < len(names):
        raise ConfigError(f"--classes {path} has an empty line or a name twice; one name a line is needed")
    return names


def _expand(flag: str, pattern: str, endpoint: str) -> list[str]:
    """Paths, absolute, or URLs."""
    if Path(pattern).is_file():
        return [str(Path(pattern).absolute())]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"{flag} is '{pattern}', whose braces cannot be read: {error}") from error
    found = [where for name in names for where in (_at_url if is_url(name) else _at_path)(flag, name, endpoint)]
    if not found:
        raise ConfigError(f"{flag} is '{pattern}', which names no tar that is there; look at the path")
    return found


def _at_path(_: str, name: str, __: str) -> list[str]:
    path = Path(name).expanduser().absolute()
    if not WILD.search(name) or path.exists():
        return [str(path)]
    found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return sorted(str(one) for one in found if not one.name.startswith("."))


def _at_url(flag: str, url: str, endpoint: str) -> list[str]:
    try:
        root, name = split_url(url)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if not WILD.search(name):
        return [url]
    if not url.startswith(BUCKETS):
        raise ConfigError(
            f"{flag} is {url}, but a web server cannot be asked for names; use braces: {{000000..000127}}"
        )
    folder = name[: WILD.search(name).start()].rpartition("/")[0]  # type: ignore[union-attr]
    try:
        names = Store(root, endpoint).names(folder)
    except StoreError as error:
        raise ConfigError(f"{flag}: {error}") from error
    return [f"{root}/{found}" for found in names if fnmatchcase(found, name) and found.count("/") == name.count("/")]


def _name(flag: str, where: str, out: str) -> str:
    """What lies in the dataset's own place moves with it."""
    folder, _, name = where.rpartition("/")
    if folder == out.rstrip("/"):
        return name
    if is_url(where):
        return where
    if is_url(out):
        raise ConfigError(
            f"{flag} is {where} on this machine, which cannot be reached from --out {out}; copy the tars "
            "there, or name a folder"
        )
    return "file://" + quote(where)
