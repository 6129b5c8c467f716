"""Nodes that an autoscaler adds are asked for when a run starts, and waited for."""

import json
import sys

import pytest

from orchestrator.cluster import scaling
from orchestrator.cluster.scaling import await_nodes
from orchestrator.config import ClusterConfig
from tests.hosts import Hosts, supported


class Autoscaler:
    """A stand-in for Ray: places are there once so many looks were taken."""

    def __init__(self, monkeypatch, comes_after):
        self.comes_after, self.looks, self.now, self.asked, self.given_back = comes_after, 0, 0.0, [], 0
        monkeypatch.setattr(scaling, "placement_group", self._ask)
        monkeypatch.setattr(scaling, "remove_placement_group", self._give_back)
        monkeypatch.setattr(scaling, "placement_group_table", self._look)
        monkeypatch.setattr(scaling, "time", self)
        monkeypatch.setattr(scaling.session, "nodes", lambda: [None] * (1 + self.looks // 4))
        monkeypatch.setattr(scaling.session, "gpus_of", lambda cluster: int(cluster.device == "gpu"))

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def _ask(self, bundles):
        self.asked += bundles
        return "wanted"

    def _give_back(self, wanted):
        self.given_back += 1

    def _look(self, wanted):
        self.looks += 1
        return {"state": "CREATED" if self.looks > self.comes_after else "PENDING"}


def cluster(**settings):
    return ClusterConfig(workers="1..3", cpus_per_worker=2, **settings)


def test_nobody_is_asked_where_it_shall_not_wait(monkeypatch):
    ray = Autoscaler(monkeypatch, 0)
    await_nodes(cluster(), 3, pytest.fail)
    assert (ray.asked, ray.now) == ([], 0.0)


@pytest.mark.parametrize(("device", "bundle"), [("cpu", {"CPU": 2.0}), ("gpu", {"CPU": 2.0, "GPU": 1.0})])
def test_places_are_asked_for_and_given_back(monkeypatch, device, bundle):
    ray, said = Autoscaler(monkeypatch, 10), []
    await_nodes(cluster(start_seconds=60, device=device), 3, said.append)
    assert ray.asked == [bundle] * 3
    assert (ray.now, ray.given_back) == (10 * scaling.LOOK_S, 1)
    assert said[0] == (
        "waiting for nodes with room for 3 workers, at most 60 s (cluster.start_seconds): the cluster has 1 now"
    )
    assert [line.split()[-2] for line in said] == ["1", "2", "3"]  # once for each node that comes


def test_places_that_are_there_are_not_waited_for(monkeypatch):
    ray = Autoscaler(monkeypatch, 0)
    await_nodes(cluster(start_seconds=60), 3, pytest.fail)
    assert (ray.now, ray.given_back) == (0.0, 1)


def test_it_waits_no_longer_than_it_may(monkeypatch):
    ray = Autoscaler(monkeypatch, 10**9)
    await_nodes(cluster(start_seconds=60), 3, lambda _: None)
    assert (ray.now, ray.given_back) == (60.0, 1)


def test_a_stop_ends_the_wait(monkeypatch):
    ray = Autoscaler(monkeypatch, 10**9)
    with pytest.raises(KeyboardInterrupt):
        await_nodes(cluster(start_seconds=60), 3, lambda _: None, lambda: ray.now >= 2.0)
    assert (ray.now, ray.given_back) == (2.0, 1)


PLAN = {
    "cluster_name": "fake",
    "max_workers": 1,
    "idle_timeout_minutes": 5,
    "provider": {"type": "fake_multinode"},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 2, "object_store_memory": 100_000_000}, "node_config": {}, "max_workers": 1},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "file_mounts": {},
    "cluster_synced_files": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "setup_commands": [],
    "initialization_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "auth": {},
    "docker": {},
}


class Growing(Hosts):
    """A head that places nothing, and Ray's own autoscaler, which starts a node of two CPUs beside it."""

    def begin(self):
        plan = self.folder / "autoscaler.json"
        plan.write_text(json.dumps(PLAN))
        self.options.append(f"--autoscaling-config={plan}")
        self.settings |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        super().begin()


@pytest.mark.long
@pytest.mark.skipif(bool(supported()), reason=supported())
def test_a_run_on_a_cluster_without_workers_gets_them(home):
    """Ray's real autoscaler, with its provider for tests: nodes are processes on one host."""
    line = [sys.executable, "-m", "jobs.train", "--recipe", "digits-quick", "--tracking.uri", "off",
            "--data.root", str(home / "data" / "digits"), "--cluster.workers", "2"]  # fmt: skip
    with Growing(cpus=(0,)) as hosts:
        hosts.wait(1)
        runs = ["--cluster.storage", str(hosts.shared / "runs"), "--name"]
        refused = hosts.run(0, [*line, *runs, "a"])
        assert "asks for 2 workers of 1 CPU each; the cluster has room for 0" in refused.communicate()[1]
        assert refused.returncode == 4
        driver = hosts.run(0, [*line, *runs, "b", "--cluster.start_seconds", "200"])
        said, error = driver.communicate()
        assert driver.returncode == 0, said + error
        assert "waiting for nodes with room for 2 workers" in said
        result = json.loads((hosts.shared / "runs" / "b" / "result.json").read_text())
        assert (result["status"], result["world_size"]) == ("finished", 2)
