"""The harness for real hosts: their nodes join, die, fall silent and come back, and Ray sees each of it."""

import json
import os
import stat
import sys
import time

import pytest

from tests.hosts import Hosts, shipped, supported

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(supported()), reason=supported())]
# A node counts as dead after about 5 s: three questions a second apart, of which each waits 2 s.
QUICK = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
WHERE = """
import json, ray
ray.init(log_to_driver=False, logging_level="ERROR")
nodes = [(n["NodeManagerAddress"], n["Alive"], n["Resources"].get("CPU", 0)) for n in ray.nodes()]
print(json.dumps([ray.util.get_node_ip_address(), sorted(nodes)]))
"""


@pytest.mark.long
def test_nodes_join_die_fall_silent_and_come_back():
    with Hosts(cpus=(0, 1), settings=QUICK) as hosts:
        hosts.wait(2)
        seen, err = hosts.run(1, [sys.executable, "-c", WHERE]).communicate(timeout=60)
        assert seen, err
        assert json.loads(seen) == ["10.83.0.11", [["10.83.0.10", True, 0], ["10.83.0.11", True, 1.0]]]
        hosts.kill(1)
        hosts.wait(1)
        hosts.add(1)
        hosts.wait(2)
        hosts.cut(1)
        hosts.wait(1)
        hosts.heal(1)
        give_up = time.monotonic() + 60
        while hosts.serves(1):  # a node that was given up ends when it hears of it
            assert time.monotonic() < give_up
            time.sleep(0.1)
        assert hosts.on(1)
        hosts.add(1)
        hosts.wait(2)


def test_what_ships_is_what_is_started():
    assert shipped()["RAY_AUTH_MODE"] == "token"
    with Hosts(cpus=(1,), settings={"RAY_worker_niceness": "7"}) as hosts:
        assert stat.S_IMODE(hosts.token.stat().st_mode) == 0o600
        hosts.wait(1)
        raylet = next(p for p in hosts.processes(0) if p.name() == "raylet")
        wanted = shipped() | {"RAY_worker_niceness": "7", "RAY_AUTH_TOKEN_PATH": str(hosts.token)}
        assert wanted.items() <= raylet.environ().items()
        stranger = {"RAY_AUTH_TOKEN_PATH": os.devnull}
        started = hosts.run(0, [sys.executable, "-c", WHERE], stranger)
        _, err = started.communicate(timeout=60)
        assert started.returncode
        assert "token" in err.lower()
