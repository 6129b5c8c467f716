"""The benchmark of metrics runs, and says what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.slow
def test_it_measures(tmp_path):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"SKIPLANE_HOME": str(tmp_path)}
    line = [sys.executable, "-m", "benchmarks.metering", "--blocks", "4", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < figures["add_us"] < figures["tell_us"] <= figures["tell_us_p95"]
    assert [len(figures[f"{clock}_ratio"]) for clock in ("wall", "cpu")] == [3, 3]
    assert "us a word to Ray" in done.stdout
