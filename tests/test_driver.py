"""Which drivers are surely dead: those of this very process table that are not in it any more."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from orchestrator.state.driver import Driver


@pytest.fixture(scope="module")
def gone():
    """A driver that was here."""
    return driver_of()


def driver_of(*prefix):
    script = "import json; from orchestrator.state.driver import Driver; print(json.dumps(vars(Driver.this())))"
    done = subprocess.run([*prefix, sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    return Driver(**json.loads(done.stdout))


def test_who_is_surely_dead(gone):
    me = Driver.this()
    boot, _, namespace = me.table.partition(" ")
    assert (len(boot), namespace[:5]) == (36, "pid:[")
    table = {
        me: False,
        replace(me, started=me.started - 1): True,  # the pid is used again
        gone: True,
        # An equal pid says nothing in another process table, an equal host name neither.
        replace(gone, host="another-host"): False,
        replace(gone, table=f"{boot} pid:[1]"): False,
        replace(gone, table=f"{'0' * 36} {namespace}"): False,
        replace(gone, table=""): False,
    }
    assert {driver: driver.surely_dead() for driver in table} == table


@pytest.mark.parametrize("proc", [(), ("--mount-proc",)])
def test_a_process_of_another_namespace_is_not_looked_for_here(gone, proc):
    """As in a container: the host's name, and pids that start anew."""
    apart = ("unshare", "--pid", "--fork", *proc)
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this machine does not allow process namespaces")
    driver = driver_of(*apart)
    assert (driver.host, driver.pid) == (gone.host, 1)
    assert driver.table != gone.table
    assert bool(driver.table) == bool(proc)  # without a /proc of its own it cannot know
    assert not driver.surely_dead()


def test_a_process_that_proc_does_not_show_may_live(gone, monkeypatch):
    monkeypatch.setattr("orchestrator.state.driver._started", lambda pid: None)
    assert not replace(gone, pid=os.getpid()).surely_dead()
    assert gone.surely_dead()
