"""The arithmetic of benchmarks.sweep, what it counts as CPU seconds, and a quick round of its peer."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from benchmarks import sweep
from benchmarks.meter import Meter
from benchmarks.swept import Trial, Turn, against, figures, stretches
from orchestrator.cluster.processes import MARK
from pipelines.errors import ClusterError, ConfigError

SMALL, LARGE = {"model.depth": "18"}, {"model.depth": "34"}
BARE = [
    {"point": SMALL, "seconds": 6.0, "cpu_s": 3.0, "top1": [0.1, 0.2, 0.3]},
    {"point": LARGE, "seconds": 12.0, "cpu_s": 6.0, "top1": [0.2, 0.4, 0.6]},
]
TURN = Turn(
    began=1000.0, wall_s=50.0, cpu_s=39.0,
    trials=[Trial(LARGE, [0.2, 0.4, 0.6], [1025.0, 1030.0, 1040.0]), Trial(SMALL, [0.1, 0.2, 0.3], [1020, 1021, 1023])],
)  # fmt: skip


@pytest.mark.parametrize(("concurrent", "overhead_s"), [(1, 16.0), (2, 41.0)])
def test_overhead_is_what_bare_training_does_not_take(concurrent, overhead_s):
    row = figures(TURN, BARE, concurrent)
    assert (row["training_s"], row["training_cpu_s"], row["epochs"]) == (18.0, 9.0, 6)
    assert (row["overhead_s"], row["cpu_overhead_s"]) == (overhead_s, 15.0)


def test_of_a_trial_that_was_stopped_only_what_it_trained_is_training():
    stopped = Turn(TURN.began, TURN.wall_s, TURN.cpu_s, [Trial(LARGE, [0.2], [1025.0]), TURN.trials[1]])
    row = figures(stopped, BARE, 1)
    assert (row["training_s"], row["epochs"], row["overhead_s"]) == (pytest.approx(10.0), 4, pytest.approx(20.0))


def test_stretches_add_up_to_the_whole():
    parts = stretches(TURN)
    assert list(parts.values()) == [20.0, 20.0, 10.0, 18.0]
    assert sum(list(parts.values())[:3]) == TURN.wall_s


@pytest.mark.parametrize(
    "trials",
    [TURN.trials[:1], [TURN.trials[0], Trial(SMALL, [0.1, 0.2, 0.3000001], [1020, 1021, 1023])]],
    ids=["one is missing", "another accuracy"],
)
def test_who_trains_something_else_is_not_compared(trials):
    with pytest.raises(ClusterError, match=r"not the same was trained: .*18"):
        figures(Turn(1000.0, 50.0, 39.0, trials), BARE, 1)


def test_ratios_are_of_the_same_round():
    def row(case, way, *values):
        return [
            {"case": case, "way": way, "wall_s": v, "cpu_s": v, "overhead_s": v, "cpu_overhead_s": 2 * v}
            for v in values
        ]

    rows = row("none:1", "skiplane", 1.0, 9.0, 2.0) + row("none:1", "stock", 4.0, 10.0, 4.0)
    found = against(rows + row("asha:2", "skiplane", 1.0) + row("asha:2", "stock", 2.0), "stock")
    assert found["none:1"]["wall_s"] == {"median": 0.5, "least": 0.25, "most": 0.9}
    assert found["asha:2"]["cpu_overhead_s"] == {"median": 0.5, "least": 0.5, "most": 0.5}


BURN = "import sys, time; input()\nwhile time.process_time() < {}: pass\nprint(flush=True); input()"


def burn(seconds, mark):
    """A process that uses so much once it gets a line, says so, and ends with another line."""
    command = [sys.executable, "-c", BURN.format(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {MARK: mark}, **pipes)


def test_the_meter_counts_marked_processes_also_when_they_have_ended():
    with burn(0.5, "ours") as ours, burn(1.0, "theirs") as theirs, Meter(["ours"]) as meter:
        for process in (ours, theirs):
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
        used = meter.cpu_s()
        own = psutil.Process(ours.pid).cpu_times()
        assert used + 0.02 >= 0.5
        assert used <= own.user + own.system + 0.02 < 1.0
        for process in (ours, theirs):
            process.communicate("\n")
        assert used <= meter.cpu_s() < 1.0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--ways", "skiplane,own"], "--ways: own is none of skiplane, stock, stock-tuned"),
        (["--cases", "none:0"], "--cases: 'none:0' is no case; give none:N or asha:N, N trials at once"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, sentence):
    with pytest.raises(ConfigError) as refused:
        sweep.main(flags)
    assert str(refused.value) == sentence


@pytest.mark.slow
@pytest.mark.long
def test_a_quick_round_of_the_stock_way(tmp_path, capsys):
    """It trains what is trained bare, to the last digit: else main raises."""
    assert sweep.main(["--quick", "--ways", "stock", "--json", str(tmp_path / "figures.json")]) == 0
    [row] = json.loads((tmp_path / "figures.json").read_text())["turns"]
    assert (row["way"], row["epochs"]) == ("stock", 1)
    assert 0 < row["overhead_s"] < row["wall_s"]
    assert row["cpu_s"] > row["training_cpu_s"]
    assert "overhead a trial" in capsys.readouterr().out
