"""Two drivers of one name cannot both train: one is refused, and a dead one's lease is taken over."""

import subprocess
import sys
import time

import pytest

from orchestrator.state import lease as leases
from orchestrator.state.lease import Holder, lease
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    return Storage(str(tmp_path / "run"))


def hold(storage, said, patience_s=2.0):
    return lease(storage, "a", said.append, patience_s)


def elsewhere(storage, number=4):
    """A lease that nobody on this host can check."""
    import json
    from dataclasses import asdict

    storage.write(leases.NAME, json.dumps(asdict(Holder("x", "another-host", 1, 0.0, number))).encode())


def test_a_second_driver_is_refused_while_the_first_lives(storage):
    said = []
    with hold(storage, []):
        with pytest.raises(ClusterError, match=r"run 'a' is being trained by process \d+ on"), hold(storage, said):
            pass
        assert "whether it lives" in said[0]
    assert storage.names() == []  # given back
    with hold(storage, said):
        pass
    assert len(said) == 1  # nobody was there


def test_a_killed_driver_on_this_host_is_known_to_be_dead_at_once(storage):
    script = (
        "import sys, time; from orchestrator.state.lease import lease; from orchestrator.state.storage import Storage\n"
        "with lease(Storage(sys.argv[1]), 'a', print): print('held', flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, storage.place], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "held\n"
    driver.kill()
    driver.communicate()
    said = []
    with hold(storage, said):
        assert said == []


def test_a_lease_that_nobody_renews_is_taken_over_with_a_higher_number(storage):
    elsewhere(storage, number=4)
    said = []
    with hold(storage, said, patience_s=0.3):
        assert len(said) == 1
        assert leases._read(storage).number == 5


def test_a_driver_that_lost_its_lease_stops(storage):
    with hold(storage, []) as check:
        check()
        elsewhere(storage)
        deadline = time.monotonic() + 10
        with pytest.raises(ClusterError, match="taken over by another driver"):
            check_until(check, deadline)
        assert leases._read(storage).id == "x"
    assert leases._read(storage).id == "x"  # it is not ours to give back


def check_until(check, deadline):
    while time.monotonic() < deadline:
        check()


def test_a_torn_lease_is_nobodys(storage):
    storage.write(leases.NAME, b'{"id"')
    with hold(storage, []):
        assert leases._read(storage).number == 1
