"""infra/Dockerfile and .dockerignore: read by a linter, compared with what git has, and run without Docker."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import image
from tests.machines import supported

BIN = Path(sys.executable).parent
DOCKERFILE, RULES = image.DOCKERFILE.read_text(), image.RULES.read_text()
BUILT = image.instructions(DOCKERFILE)
LEFT_OUT = (
    *(".git/config", ".venv/bin/python", "runs/a/run.json", "data/digits/dataset.json", "tests/conftest.py"),
    *("infra/compose/secrets/ray_token", "infra/compose/.env", "infra/mlflow/secrets.env", "infra/kubernetes/s.yaml"),
    *("jobs/__pycache__/train.cpython-311.pyc", "jobs/recipes/x.pyc", ".env", "secrets.env", "README.md"),
)


def complaints(dockerfile: str) -> str:
    """hadolint's."""
    command = [BIN / "hadolint", "--no-color", "-"]
    return subprocess.run(command, input=dockerfile, capture_output=True, text=True).stdout


def faults(dockerfile: str, rules: str) -> list[str]:
    """What does not fit between a Dockerfile, a .dockerignore and what git has."""
    into = image.let_through(image.tracked(), rules)
    sources = image.copied(image.instructions(dockerfile))
    allowed = [rule[1:] for rule in rules.splitlines() if rule.startswith("!")]
    return [
        *(f"COPY {source}: not let through" for source in sources if not _within(into, source)),
        *(f"{rule}: git has no such file" for rule in allowed if not _within(image.tracked(), rule)),
        *(
            f"{path}: let through, and copied by nothing"
            for path in into
            if not any(_within([path], s) for s in sources)
        ),
        *(f"{path}: let through" for path in image.let_through(LEFT_OUT, rules)),
    ]


def _within(paths, source: str) -> bool:
    return any(path == source or path.startswith(f"{source}/") for path in paths)


# -- read --------------------------------------------------------------------------------------------------------------


def test_the_linter_says_nothing() -> None:
    assert complaints(DOCKERFILE) == ""


def test_what_is_copied_is_what_is_let_through_and_nothing_else() -> None:
    assert faults(DOCKERFILE, RULES) == []


@pytest.mark.parametrize("word", sorted({word for word, _ in BUILT}))
def test_a_typo_in_an_instruction_is_seen(word: str) -> None:
    typo = re.sub(rf"^{word} ", f"{word[:-1]}x ", DOCKERFILE, count=1, flags=re.MULTILINE)
    assert typo != DOCKERFILE
    assert "unexpected" in complaints(typo)


@pytest.mark.parametrize("source", [*image.copied(BUILT), *(r[1:] for r in RULES.splitlines() if r.startswith("!"))])
def test_a_typo_in_a_path_is_seen(source: str) -> None:
    pattern, typo = rf"^(COPY |!){re.escape(source)}(?=[ /\n])", rf"\1{source[:-1]}"
    for dockerfile, rules in (
        (re.sub(pattern, typo, DOCKERFILE, flags=re.MULTILINE), RULES),
        (DOCKERFILE, re.sub(pattern, typo, RULES, flags=re.MULTILINE)),
    ):
        assert (dockerfile, rules) == (DOCKERFILE, RULES) or faults(dockerfile, rules)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        ("--no-install-recommends ", "", "DL3015"),
        ("'g++=4:12.2.*'", "g++", "DL3008"),
        ("--constraint constraints.txt ${TORCH", "${TORCH", "DL3013"),
        ("--no-cache-dir", "", "DL3042"),
        ("WORKDIR /opt/skiplane", "WORKDIR opt/skiplane", "DL3000"),
        ("ARG BASE=python:3.11.15-slim-bookworm\nFROM ${BASE}", "FROM python", "DL3006"),
    ],
)
def test_what_makes_it_worse_is_seen(before: str, after: str, said: str) -> None:
    assert before in DOCKERFILE
    assert said in complaints(DOCKERFILE.replace(before, after))


def test_it_says_what_it_is() -> None:
    found = dict(rest.split("=", 1) for word, rest in BUILT if word == "ARG")
    project = tomllib.loads((image.REPOSITORY / "pyproject.toml").read_text())["project"]
    assert found["VERSION"] == project["version"]
    labels = next(rest for word, rest in BUILT if word == "LABEL")
    names = re.findall(r'org\.opencontainers\.image\.(\w+)="\$(\w+)"', labels)
    assert names == [(name, name.upper()) for name in ("version", "revision", "source")]


def test_a_change_of_the_code_installs_nothing() -> None:
    """All that runs comes before the code; after it come only what costs nothing."""
    code = next(i for i, (word, rest) in enumerate(BUILT) if (word, rest.split()[0]) == ("COPY", "infra"))
    assert "RUN" not in {word for word, _ in BUILT[code:]}
    assert {word for word, _ in BUILT[code:]} == {"COPY", "ARG", "LABEL", "USER", "ENTRYPOINT", "CMD"}


def test_no_tools_for_tests_are_installed() -> None:
    installed = " ".join(rest for word, rest in BUILT if word == "RUN" and "pip install" in rest)
    assert "'.[server]'" in installed
    assert "dev" not in installed


@pytest.mark.parametrize(
    ("rules", "path", "goes_in"),
    [
        ("*\n!a", "a/b/c.py", True),
        ("*\n!a", "b/a", False),
        ("*\n!a\n**/*.pyc", "a/b/c.pyc", False),
        ("*\n!a/b.sh", "a/c.sh", False),
        ("*\n!a/b.sh", "a/b.sh", True),
        ("a/*.x\n!a/b.x", "a/c.x", False),
        ("a?c", "abc/d", False),
        ("", "a", True),
        ("**/secret", "secret", False),
        ("**/secret", "a/b/secret/c", False),
    ],
)
def test_rules_are_read_as_docker_reads_them(rules: str, path: str, goes_in: bool) -> None:
    assert (image.let_through([path], rules) == [path]) is goes_in


# -- run ---------------------------------------------------------------------------------------------------------------

CHECKS = """
du -sm /opt/venv /opt/skiplane
test -z "$(find /opt/skiplane /opt/venv -user 1000 -print -quit)"
inside() { setpriv --reuid 1000 --regid 1000 --clear-groups "$@"; }
inside python -c 'import torch, nvidia.dali, ray, mlflow, psycopg, boto3; print("torch", torch.__version__)'
inside python -m jobs.train --help > /dev/null
inside ray --version
inside mlflow --version
inside sh -c 'touch /cache/a /shared/a && ! touch /opt/skiplane/a' 2> /dev/null
! inside python -c 'import pytest' 2> /dev/null
"""


# By hand, because it installs everything: minutes, and gigabytes on the disk. The base is this machine with its Python,
# not python:3.11-slim.
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "SKIPLANE_TEST_IMAGE" not in os.environ, reason="installs for minutes; SKIPLANE_TEST_IMAGE=1 runs it"
)
@pytest.mark.skipif(bool(supported()), reason=supported() or "namespaces can be made")
def test_every_instruction_runs_and_what_is_installed_works(tmp_path: Path) -> None:
    context = tmp_path / "context"
    image.context(context)
    (tmp_path / "root").mkdir()
    (tmp_path / "venv").mkdir()
    script = [
        f"set -e; ROOT={tmp_path}/root",
        image.ROOT,
        f"mkdir /opt/venv; mount --bind {tmp_path}/venv /opt/venv; chmod a+x /root",
        'user=$(id --name --user 1000 2> /dev/null) && userdel "$user"; groupdel "$user" 2> /dev/null || true',
        image.script(BUILT, context),
        CHECKS,
    ]
    base = {"PATH": f"{Path(sys._base_executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    apart = ["unshare", "--mount", "--propagation", "private", "bash", "-c", "\n".join(script)]
    done = subprocess.run(apart, env=base | kept, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "\ntorch 2.13" in done.stdout
