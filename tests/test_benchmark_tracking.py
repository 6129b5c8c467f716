"""The arithmetic of benchmarks.tracking, and a short run of it."""

import json

import numpy as np
import pytest

from benchmarks import tracking
from benchmarks.reporting import metrics, point
from benchmarks.tracked import Turn, against, figures
from benchmarks.trackers import WAYS
from orchestrator.config import RunConfig
from orchestrator.plan import OFFICIAL, make_plan
from orchestrator.progress import Ear
from orchestrator.state.register import Register
from orchestrator.state.storage import Storage
from orchestrator.tracking import NullTracker
from pipelines.errors import ConfigError

# Two bare steps of 10 ms, then four, of which every other one reports a point: 1 ms and 5 ms.
TIMES = np.array([[0.010, 0], [0.010, 0], [0.010, 0], [0.010, 0.001], [0.010, 0], [0.010, 0.005]])


def turn(stored):
    return Turn(TIMES, bare=2, points=[2, 4], stored=stored, errors=0, after_s=1.5)


def test_a_point_costs_its_call_and_steps_are_compared_with_bare_ones():
    row = figures(turn({"loss": [2, 4], "top1": [2, 4]}))
    assert (row["points"], row["lost"], row["doubled"], row["after_s"]) == (2, 0, 0, 1.5)
    assert row["call_us"] == pytest.approx(3000)
    assert row["call_us_greatest"] == pytest.approx(5000)
    assert row["held_up_s"] == pytest.approx(0.006)
    assert row["bare_ms"] == pytest.approx(10)
    assert row["step_to_bare"] == pytest.approx(1.15)  # 46 ms to 40
    assert row["median_step_to_bare"] == pytest.approx(1.05)  # of 10, 10, 11 and 15 ms


@pytest.mark.parametrize(
    ("stored", "lost", "doubled"),
    [
        ({"loss": [2], "top1": [2, 4]}, 1, 0),  # one metric of one point is missing
        ({"loss": [], "top1": []}, 2, 0),
        ({"loss": [2, 4, 4], "top1": [2, 2, 4]}, 0, 2),
        ({"loss": [2, 4], "top1": [2, 4, 6]}, 0, 0),  # what nobody reported is not counted here
    ],
)
def test_a_point_is_there_when_all_of_it_is(stored, lost, doubled):
    row = figures(turn(stored))
    assert (row["lost"], row["doubled"]) == (lost, doubled)


def test_ratios_are_of_the_same_round():
    def rows(way, case, values):
        costs = ({"call_us": v, "held_up_s": v, "step_to_bare": v} for v in values)
        return [{"round": number, "case": case, "way": way} | cost for number, cost in enumerate(costs)]

    ours, others = rows("skiplane", "hung:1", [1.0, 2.0, 4.0]), rows("mlflow", "hung:1", [10.0, 10.0, 10.0])
    found = against(ours + others + rows("mlflow", "healthy:1", [1.0]))  # without ours there is nothing to compare
    assert {case: list(ways) for case, ways in found.items()} == {"hung:1": ["mlflow"]}
    quartiles = {"low": 3.75, "median": 5.0, "high": 7.5}
    assert found["hung:1"]["mlflow"] == {"call_us": quartiles, "held_up_s": quartiles, "step_to_bare": quartiles}


class Remembering(NullTracker):
    """Keeps the points."""

    def __init__(self):
        self.seen = []

    def metrics(self, points):
        self.seen += points


def test_the_peers_log_what_the_driver_makes_of_a_point(tmp_path):
    config, tracker = RunConfig(), Remembering()
    register = Register(Storage(str(tmp_path)), {}, print)
    ear = Ear(config, make_plan(config, OFFICIAL["imagenet"]), register, tracker, print, lambda record: None)
    record = point(7)
    ear.hear([record])
    assert {p.key for p in tracker.seen} == set(metrics(record))
    assert {p.step for p in tracker.seen} == {7}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--ways", "skiplane,wandb"], f"--ways: wandb is none of {', '.join(WAYS)}"),
        (["--rounds", "0"], "--rounds is 0; at least 1 is needed"),
        (
            ["--steps", "20", "--cases", "healthy:1,hung:40"],
            "--cases: 'hung:40' is no case; give one of healthy, refused, hung, killed, a colon, and every how many "
            "steps a point is reported (1 to 20)",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, sentence):
    with pytest.raises(ConfigError) as refused:
        tracking.main(flags)
    assert str(refused.value) == sentence


def run(place, case, ours):
    """A short run of ours and of MLflow's own way: what it wrote."""
    flags = ["--steps", "60", "--cases", case, "--ways", f"{ours},mlflow", "--away_s", "1", "--settle_s", "1"]
    assert tracking.main(["--quick", *flags, "--json", str(place / "figures.json")]) == 0
    written = json.loads((place / "figures.json").read_text())
    assert [(row["way"], row["points"]) for row in written["turns"]] == [(ours, 60), ("mlflow", 60)]
    for row in written["turns"]:
        assert 0 < row["call_us"] <= row["call_us_p95"] <= row["call_us_greatest"] <= 1e6 * row["held_up_s"]
        assert row["bare_ms"] > 0
    assert list(written["summary"][case]) == [ours, "mlflow"]
    return written


def unharmed(row):
    return (row["lost"], row["doubled"], row["errors"], row["failed"]) == (0, 0, 0, 0)


@pytest.mark.long
@pytest.mark.slow
def test_a_server_that_hangs_costs_ours_no_point(tmp_path):
    assert unharmed(run(tmp_path, "hung:1", "skiplane-local")["turns"][0])


@pytest.mark.slow
@pytest.mark.long
def test_a_server_that_is_killed_costs_a_worker_no_point(tmp_path, capsys):
    """On Ray; the server comes back after the last step."""
    written = run(tmp_path, "refused:1", "skiplane")
    assert unharmed(written["turns"][0])
    assert written["its_to_ours"]["refused:1"]["mlflow"]["call_us"]["median"] > 0
    assert "refused:1: mlflow / skiplane: us a point" in capsys.readouterr().out
