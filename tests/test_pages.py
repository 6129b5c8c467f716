"""The links that commands print, opened in a browser: what a person sees there, without a click.

One cluster as `jobs.local up` makes it; a study, a sweep and a run of one epoch each.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import local, processes, services
from tests import browser

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium to look at pages"),
]
SHORT = ("--recipe", "digits-quick", "--model.width", "4", "--train.epochs", "1", "--tracking.model", "false")
SIDE = 200  # px that a chart has at least

WORDS = "document.body.innerText.split('\\n').map(line => line.trim())"
# The list beside the charts, from top to bottom.
ROWS = """[...document.querySelectorAll('.ag-row')].map(row => [+row.getAttribute('row-index'), row.innerText])
    .sort((a, b) => a[0] - b[0]).map(row => row[1].trim().split('\\n').pop()).filter(name => name)"""
# Of each chart its width and how long its lines are, in pixels.
CURVES = """[...document.querySelectorAll('.js-plotly-plot')].map(chart => [chart.clientWidth,
    [...chart.querySelectorAll('path.js-line')].map(line => Math.round(line.getTotalLength()))])"""
# Names of the axes, and how many pixels of the lines between them are painted.
PARALLEL = """({axes: [...document.querySelectorAll('.parcoords .dimension .label')].map(label => label.textContent),
    painted: [...document.querySelectorAll('.parcoords canvas.foreground')].map(canvas => canvas.getContext('2d')
        .getImageData(0, 0, canvas.width, canvas.height).data.filter((value, i) => i % 4 == 3 && value > 0).length)})"""
PICTURES = """[...document.querySelectorAll('img')].map(image => [image.getAttribute('src').split('&')[0].slice(0, 80),
    image.naturalWidth, image.clientWidth])"""


class Cluster:
    """Runs commands as a user of `jobs.local up` does."""

    def __init__(self, made: local.Cluster) -> None:
        shell = services.environment(made.home, made.ports, os.environ)
        self._shell = shell | {"RAY_ADDRESS": f"{services.HOST}:{made.ports['ray']}"}
        self._runs = made.home / "runs"

    def link(self, label: str, job: str, *flags: str) -> str:
        """The address that a command prints behind a label."""
        command = [sys.executable, "-m", f"jobs.{job}", *SHORT, *flags]
        done = subprocess.run(command, cwd=ROOT, env=self._shell, capture_output=True, text=True, timeout=250)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        found = re.search(rf"^ *{label} +(http\S+)$", done.stdout, re.MULTILINE)
        assert found, done.stdout
        return found[1]

    def result(self, name: str) -> Any:
        """What the command left for scripts."""
        return json.loads((self._runs / name / "result.json").read_text())


@pytest.fixture(scope="module")
def cluster(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    own = tmp_path_factory.mktemp("pages")
    (own / "data").symlink_to(home / "data")
    yield Cluster(local.up(own, {name: processes.free_port() for name in local.DEFAULT_PORTS}, print))
    local.down(own, print)


def test_a_studys_curves_lie_side_by_side(cluster: Cluster) -> None:
    link = cluster.link("Curves:", "study", "--nets", "plain-18,resnet-18", "--name", "demo")
    with browser.opened(link) as page:
        page.until(CURVES, lambda charts: charts and len(charts) > 1 and len(long(charts[0])) > 1)
        assert sorted(page.ask(ROWS)) == ["plain-18-s0", "resnet-18-s0"]  # and not the study's own run
        words = page.until(WORDS, lambda seen: "plain-18-s0 (val/error)" in seen)
        shown = {f"{net}-s0 ({metric})" for net in ("plain-18", "resnet-18") for metric in ("train/loss", "val/error")}
        assert shown <= set(words)


def long(chart: tuple[float, list[int]]) -> list[int]:
    """Curves that can be seen, of a chart that can."""
    width, lengths = chart
    return [length for length in lengths if length > SIDE / 2] if width > SIDE else []


def test_a_sweeps_trials_are_listed_best_first(cluster: Cluster) -> None:
    link = cluster.link("Trials:", "sweep", "--sweep.depth", "18", "--sweep.lr", "0.05,0.1,0.2", "--sweep.stop", "none",
                        "--name", "s1")  # fmt: skip
    trials = sorted(cluster.result("s1")["trials"], key=lambda trial: -trial["top1"])
    with browser.opened(link) as page:
        assert page.until(ROWS, lambda rows: rows and len(rows) >= 3) == [trial["title"] for trial in trials]
        seen = page.until(PARALLEL, lambda seen: seen and any(seen["painted"]))
        assert seen["axes"] == ["model.depth", "optim.lr", "val/top1_best"]
        assert max(seen["painted"]) > SIDE  # three lines across the chart


def test_a_runs_page_says_what_came_out(cluster: Cluster) -> None:
    link = cluster.link("MLflow", "train", "--name", "a")
    result = cluster.result("a")
    with browser.opened(link) as page:
        words = page.until(WORDS, lambda seen: seen and "Show more" in seen)
        description = words[words.index("Description") :]
        first = next(line for line in description if "Top-1" in line)
        assert first.startswith(f"Top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} of 360 validation images")
        assert any(line.startswith("top-1") and "training loss" in line for line in description)  # the table
        [(_, own, shown)] = page.until(
            f"{PICTURES}.filter(picture => picture[0] == 'get-artifact?path=curves.svg')",
            lambda found: found and found[0][1] > 0,
        )
        assert min(own, shown) > SIDE
        tags = words[words.index("Tags") :]
        assert any(line.startswith("skiplane.kind") for line in tags)
        assert "Runs" in words  # the pages for training, not those for language models
        assert "Evaluations" not in words
