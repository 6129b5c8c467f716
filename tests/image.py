"""What infra/Dockerfile makes, without Docker: what goes into the build, and its instructions as a shell script.

script(instructions(DOCKERFILE.read_text()), context)  # runs in a root of its own: see ROOT
"""

import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
DOCKERFILE, RULES = REPOSITORY / "infra" / "Dockerfile", REPOSITORY / ".dockerignore"
# A root file system that is this machine's until something is written: what is written lies in memory and ends with
# its mount namespace. $ROOT is an empty folder; /tmp stays this machine's.
ROOT = """
mount -t tmpfs tmpfs "$ROOT"
mkdir "$ROOT/up" "$ROOT/work" "$ROOT/new"
mount -t overlay overlay -o "lowerdir=/,upperdir=$ROOT/up,workdir=$ROOT/work" "$ROOT/new"
for each in proc sys dev tmp; do mount --rbind "/$each" "$ROOT/new/$each"; done
cd "$ROOT/new"
mkdir .old
pivot_root . .old
umount --lazy /.old
cd /
"""


@functools.cache
def tracked() -> tuple[str, ...]:
    """Every file that git knows, as paths from the repository's root."""
    return _listed("--cached")


def context(folder: Path) -> None:
    """Copies into a folder what a build would get of the working tree: also files that git will only know."""
    for path in let_through(_listed("--cached", "--others", "--exclude-standard"), RULES.read_text()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / path, folder / path)


def _listed(*which: str) -> tuple[str, ...]:
    command = ["git", "ls-files", "-z", *which]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return tuple(name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).exists())


def let_through(paths: Iterable[str], rules: str) -> list[str]:
    """The paths that a .dockerignore lets into the build: the last rule for a path or a folder above it decides."""
    lines = [line.strip() for line in rules.splitlines() if line.strip() and not line.startswith("#")]
    decided = [(_pattern(line.lstrip("!")), line.startswith("!")) for line in lines]

    def kept(path: str) -> bool:
        above = [path, *map(str, Path(path).parents)][:-1]
        return next((keep for fits, keep in reversed(decided) if any(map(fits.fullmatch, above))), True)

    return [path for path in paths if kept(path)]


def _pattern(rule: str) -> re.Pattern[str]:
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(words.get(w, re.escape(w)) for w in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", rule)))


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """("RUN", "apt-get update ..."), in order; lines that go on are one, comments are none."""
    text = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def copied(found: Sequence[tuple[str, str]]) -> list[str]:
    """The sources of every COPY."""
    return [source.rstrip("/") for word, rest in found if word == "COPY" for source in shlex.split(rest)[:-1]]


def environment(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What ENV sets, PATH without what was there before."""
    pairs = [pair.split("=", 1) for word, rest in found if word == "ENV" for pair in shlex.split(rest)]
    return {name: value.removesuffix(":$PATH") for name, value in pairs}


def script(found: Sequence[tuple[str, str]], folder: Path) -> str:
    """bash that does what a build does, from a folder with the files that were let through."""
    return "\n".join(["set -euo pipefail", *(_step(word, rest, folder) for word, rest in found)])


def _step(word: str, rest: str, folder: Path) -> str:
    match word:
        case "ARG":
            name, _, value = rest.partition("=")
            return f"export {name}=${{{name}-{shlex.quote(value)}}}"
        case "ENV":
            return f"export {rest}"
        case "WORKDIR":
            return f"mkdir -p {rest} && cd {rest}"
        case "RUN":
            return f"echo + {shlex.quote(rest)}; sh -ec {shlex.quote(rest)}"
        case "COPY":
            *sources, target = shlex.split(rest)
            return "\n".join(_copy(folder / source, target) for source in sources)
    return ":"  # FROM, LABEL, USER, ENTRYPOINT, CMD: about the image


def _copy(source: Path, target: str) -> str:
    """A folder's content goes into the target, a file beside what is there."""
    what = f"{source}/." if source.is_dir() else str(source)
    return f"mkdir -p {target} && cp -r {shlex.quote(what)} {target}"
