"""A sweep on real hosts: its trials' drivers are not all on the head, and a host that dies with one changes nothing."""

import json
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from orchestrator.state.storage import Storage
from orchestrator.sweep.journal import Journal
from tests.hosts import Hosts, supported

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(supported()), reason=supported() or "hosts can be made"),
]
LINE = ("-m", "jobs.sweep", "--recipe", "digits-quick", "--model.width", "4", "--train.epochs", "6", "--name", "s")
SPACE = ("--sweep.depth", "18,34", "--sweep.lr", "0.05,0.001", "--sweep.stop", "none", "--tracking.uri", "off")
EQUAL = ("id", "config", "state", "reason", "epochs", "top1", "weights_sha256")
LIMIT_S = 200.0


def slots(hosts, i):
    """Processes of trials' drivers on a host."""
    found = []
    for process in hosts.processes(i):
        try:
            found += [process] * ("ResourceTrainable" in " ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def until(true, driver):
    limit = time.monotonic() + LIMIT_S
    while not true():
        assert driver.poll() is None, driver.stderr.read()[-2000:]
        assert time.monotonic() < limit
        try:
            driver.wait(0.2)
        except subprocess.TimeoutExpired:
            continue


def told(folder):
    found = json.loads((folder / "s" / "result.json").read_text())
    return [{name: trial[name] for name in EQUAL} for trial in found["trials"]]


def test_a_host_that_dies_with_a_trials_driver_and_its_worker_changes_nothing(home, tmp_path):
    with Hosts(cpus=(0, 1, 1)) as hosts:
        hosts.wait(3)
        data, runs = hosts.shared / "digits", hosts.shared / "runs"
        shutil.copytree(home / "data" / "digits", data)
        place = ("--data.root", str(data), "--cluster.storage")
        line = [sys.executable, *LINE, *SPACE, *place]
        driver = hosts.run(0, [*line, str(runs)])
        journal = Journal(Storage(str(runs / "s")))
        until(lambda: sum(trial.epoch for trial in journal.trials().values()) >= 2, driver)
        with_slots = [i for i in range(3) if slots(hosts, i)]
        assert len(with_slots) == 2  # two trials at once, whose drivers are apart
        hosts.kill(max(with_slots))
        until(lambda: sum(trial.over for trial in journal.trials().values()) >= 1, driver)
        hosts.add(max(with_slots))
        out, err = driver.communicate(timeout=LIMIT_S)
        assert (driver.returncode, err) == (0, ""), out
        calm = hosts.run(0, [*line, str(hosts.shared / "calm")])
        out, err = calm.communicate(timeout=LIMIT_S)
        assert (calm.returncode, err) == (0, ""), out
        assert told(runs) == told(hosts.shared / "calm")
