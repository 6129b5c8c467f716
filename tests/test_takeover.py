"""A whole driver that stood still, and lost its run: it wakes up, says so, and writes nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.state.lease import lease
from orchestrator.state.storage import Storage

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
FLAGS = ("--recipe", "digits-quick", "--model.width", "4", "--train.epochs", "3", "--tracking.uri", "off")


@pytest.fixture
def driver(home, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"SKIPLANE_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "jobs.train", *FLAGS, "--name", "a", "--cluster.storage", str(tmp_path)]
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        yield process
        if process.poll() is None:
            psutil.Process(process.pid).resume()
            process.kill()


@pytest.mark.long
def test_a_driver_that_stood_still_too_long_ends_without_a_result(driver, tmp_path):
    assert any("epoch 1/3 done" in line for line in driver.stdout)
    driver.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, driver.pid, os.WSTOPPED)
    storage, said = Storage(str(tmp_path / "a")), []
    begun = storage.read("run.json")
    with lease(storage, "a", said.append) as held:  # its workers train on to the end meanwhile
        assert (held.number, len(said)) == (2, 1)
        driver.send_signal(signal.SIGCONT)
        _, err = driver.communicate(timeout=120)
        assert driver.returncode == 4, err[-3000:]
        assert "run 'a' was taken over by another driver; this one stops" in err
        assert (storage.read("result.json"), storage.read("run.json")) == (None, begun)
        held.confirm()
    assert [name for name in storage.names() if name.startswith("lease")] == ["lease/000000002.json"]
