"""Every shell script below infra/: read by shellcheck, and by the shell that it names."""

import subprocess
import sys
from pathlib import Path

import pytest

INFRA = Path(__file__).parent.parent / "infra"
SCRIPTS = sorted(path for end in ("*.sh", "*.sbatch") for path in INFRA.rglob(end))
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
SHEBANGS = {"#!/bin/sh": "sh", "#!/usr/bin/env bash": "bash", "#!/bin/bash": "bash"}

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(INFRA)))


def complaints(text: str) -> str:
    """Of the shell that the first line names, which only reads it, and of shellcheck."""
    shell = SHEBANGS.get(text.partition("\n")[0].removesuffix(" -l"))
    if shell is None:
        return f"its first line is none of {', '.join(SHEBANGS)}"
    read = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
    checked = subprocess.run([SHELLCHECK, "-"], input=text, capture_output=True, text=True)
    return read.stderr + checked.stdout + checked.stderr


def test_there_are_some() -> None:
    assert {"start.sh", "environment.sh", "serve.sh", "secrets.sh", "entrypoint.sh"} <= {path.name for path in SCRIPTS}


@each
def test_nobody_complains_and_it_stops_at_the_first_error(script: Path) -> None:
    text = script.read_text()
    assert complaints(text) == ""
    assert "\nset -eu" in text


@each
def test_a_typo_is_seen(script: Path) -> None:
    text = script.read_text()
    assert "syntax error" in complaints(f"{text}\nif true; then\n").lower()
    assert "SC2086" in complaints(f"{text}\nsome=$1\nrm -- $some\n")
    assert "first line" in complaints(text.replace("#!", "#", 1))
