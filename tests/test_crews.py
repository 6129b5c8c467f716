"""Groups that outlive a run, on a real Ray: the next run takes up the workers, and its bits are those of fresh ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.environment import DRIVER
from orchestrator.cluster.services import token_file
from pipelines.dataset import open_dataset
from tests.datasets import garble

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.long
BITS = ("status", "weights_sha256", "data_digest", "eval_digest", "train_loss", "top1")


@pytest.fixture(scope="module")
def told(home, tmp_path_factory):
    """What tests/in_turn.py tells: all runs of this file, in one driver."""
    place = tmp_path_factory.mktemp("crews")
    shutil.copytree(home / "data" / "digits", place / "broken")
    garble(open_dataset(place / "broken"), "train", 5)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    token = {"RAY_AUTH_TOKEN_PATH": str(token_file(home)), "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "tests.in_turn", str(home), str(place / "runs"), str(place / "broken")]
    done = subprocess.run(line, cwd=ROOT, env=kept | DRIVER | token, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def bits(run):
    return {name: run[name] for name in BITS}


@pytest.mark.parametrize("workers", [1, 2])
def test_after_another_net_the_bits_are_those_of_fresh_workers(told, workers):
    """Before it came a run of another depth, batch, number of lanes and way to sum; of two workers one was stopped."""
    assert told["stopped"]["status"] == "stopped"
    assert bits(told[f"b {workers}"]) == bits(told[f"alone {workers}"])
    assert told[f"a {workers}"]["weights_sha256"] != told[f"b {workers}"]["weights_sha256"]


def test_workers_are_taken_up_where_they_fit(told):
    """(group, pieces of work it was given), run by run."""
    assert (
        told["taken"]
        == [
            [0, 1],  # a, two workers
            [0, 2],  # a look
            [0, 3],  # stopped
            [0, 4],  # b
            [0, 5],  # a look
            [0, 6],  # hurt: its worker is killed
            [1, 1],  # its next group, a worker of which is then killed
            *told["taken"][7:-3],
            [told["taken"][-3][0], 1],  # broken: a new group
            [told["taken"][-3][0] + 1, 1],  # a, after the error, and one worker
            [told["taken"][-3][0] + 1, 2],  # b
        ]
    )
    assert told["taken"][7:-3] in ([], [[1, 2]])  # Ray had not noticed yet that the idle worker was dead


def test_a_worker_killed_in_a_later_run_is_a_restart_as_ever(told):
    assert told["hurt"]["restarts"] == 1
    assert bits(told["hurt"]) == bits(told["alone 2"])


def test_a_worker_killed_while_idle_is_no_restart(told):
    assert not [line for line in told["broken"]["said"] if line.startswith("restart")]
    assert "bad images in train: 1, data.max_bad allows 0" in told["broken"]["error"]  # it came as far as its data


def test_a_process_keeps_nothing_of_a_run(told):
    """Not even the place in the global random numbers."""
    assert told["after"] == told["before"]
    assert (told["after"]["files"], told["after"]["torch_threads"]) == ([], 1)


def test_nothing_is_left_behind(told):
    assert (told["idle"]["groups"], told["idle"]["workers"], "Post" in told["idle"]["actors"]) == (1, 2, True)
    assert told["expired"] == 0  # nobody took it: its CPUs were free before the end
    assert told["left"] == told["left alone"] == {"groups": 0, "actors": [], "workers": 0}
