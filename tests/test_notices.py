"""Real hosts: a node that is told to go is left in time; the head may die where Ray keeps its tables on a disk."""

import json
import shutil
import sys
import time

import pytest

from tests.hosts import Hosts, supported
from tests.watched import Watched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(supported()), reason=supported() or "hosts can be made"),
]
LIMIT_S = 150.0
DRAIN = """
import subprocess, sys, ray
ray.init(log_to_driver=False, logging_level="ERROR")
[node] = [n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == sys.argv[1]]
drain = ["drain-node", "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
words = ["--reason-message", "taken back", "--deadline-remaining-seconds", "60"]
subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain, *words], check=True)
"""


class Training:
    """A run on hosts that is under way, its driver on host `driver`; steps are lines."""

    def __init__(self, hosts, home, driver, log, *flags):
        hosts.wait(hosts.count)
        shutil.copytree(home / "data" / "digits", hosts.shared / "digits")
        self.runs = hosts.shared / "runs"
        place = ("--data.root", hosts.shared / "digits", "--cluster.storage", self.runs, "--tracking.uri", "off")
        steps = ("--tracking.log_steps", "1", "--tracking.progress_seconds", "1e-6")
        line = ["-m", "jobs.train", "--recipe", "digits-quick", "--name", "a", *place, *steps, *flags]
        self.watched = Watched(lambda: hosts.run(driver, [sys.executable, *map(str, line)]), log)
        self.watched.start()
        self.until(lambda: self.watched.newest.step > 20)

    def until(self, true):
        """Listens until it is; fails the test where the command ends before, or takes too long."""
        limit = time.monotonic() + LIMIT_S
        while not true():
            self.watched.listen(0.2)
            told = [event.text for event in self.watched.events if event.text][-15:]
            assert time.monotonic() < limit, told
            assert self.watched.code is None or true(), (self.watched.code, told)

    def says(self, words):
        return any(words in event.text for event in self.watched.events)

    def finished(self):
        self.until(lambda: self.watched.code is not None)
        assert self.watched.code == 0
        return json.loads((self.runs / "a" / "result.json").read_text())


@pytest.mark.long
def test_a_node_that_is_told_to_go_is_left_after_a_checkpoint(home, tmp_path):
    with Hosts(cpus=(0, 1, 1)) as hosts, (tmp_path / "log").open("w") as log:
        run = Training(hosts, home, 0, log, "--cluster.workers", "1..2", "--train.epochs", "20")
        told = hosts.run(0, [sys.executable, "-c", DRAIN, hosts.address(2)])
        _, err = told.communicate(timeout=60)
        assert told.returncode == 0, err
        run.until(lambda: run.says("resize 2 -> 1"))
        assert run.says(f"node {hosts.address(2)} was told to go: saving a checkpoint, then going on without it")
        assert run.says(": 0 samples lost, 0 steps repeated, from the checkpoint in storage")
        result = run.finished()
        assert (result["restarts"], result["resizes"], result["steps_repeated"]) == (0, 1, 0)


class DurableHead(Hosts):
    """With the tables of the head on its disk, as infra/ray.env tells how."""

    def begin(self):
        self.settings |= {
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": f"{self.own}/gcs",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
        }
        super().begin()


@pytest.mark.long
def test_the_heads_own_death_costs_nothing_where_ray_keeps_its_tables(home, tmp_path):
    """The driver is on another node, and the head comes back after some seconds: nobody stops for it."""
    with DurableHead(cpus=(0, 1, 1)) as hosts, (tmp_path / "log").open("w") as log:
        run = Training(hosts, home, 1, log, "--cluster.workers", "2", "--train.epochs", "60")
        hosts.kill(0)
        step = run.watched.newest.step
        run.until(lambda: run.watched.newest.step > step + 50)  # without a head
        hosts.add(0)
        hosts.wait(3)
        result = run.finished()
        assert (result["restarts"], result["steps_repeated"]) == (0, 0)
