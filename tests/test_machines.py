"""Machines made of namespaces: apart where they should be, together where they should be, and gone at the end."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.machines import ROOT, Machines, remove_left, supported

pytestmark = pytest.mark.skipif(bool(supported()), reason=supported())
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 4000), timeout=1); print('reached')"
LISTEN = (
    "import socket, sys; server = socket.create_server((sys.argv[1], 4000), backlog=8); print('listens'); "
    "[server.accept() for _ in range(9)]"
)
LEFT = """
import sys
from tests.machines import Machines
machines = Machines(1).__enter__()
machines.boot(0)
machines.run(0, ["sh", "-c", "sleep 1000 & echo up; wait"]).stdout.readline()
print(machines.folder, *(p.pid for p in machines.processes(0)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def machines():
    with Machines(2, shared_mb=1) as made:
        made.boot(0)
        made.boot(1)
        yield made


def said(machines, i, *command):
    """What a command on machine i printed."""
    out, err = (process := machines.run(i, command)).communicate(timeout=20)
    assert process.returncode == 0, err
    return out.strip()


def test_names_disks_and_processes_are_apart_and_one_folder_is_not(machines):
    assert said(machines, 0, "hostname") != said(machines, 1, "hostname")
    said(machines, 0, "touch", machines.own / "mine", machines.shared / "ours", "/dev/shm/memory")
    assert said(machines, 1, "ls", machines.own, "/dev/shm", machines.shared).split() == [
        *("/dev/shm:", f"{machines.own}:", f"{machines.shared}:", "ours")
    ]
    assert (machines.disk(0) / "mine").exists()
    assert said(machines, 1, "sh", "-c", "echo $$") in "23456789"  # it counts its own


def test_the_folder_of_all_can_be_full(machines):
    with pytest.raises(OSError, match="No space left on device"):
        (machines.shared / "filler").write_bytes(bytes(2 << 20))


def test_a_cut_cable_is_silent_and_heals(machines):
    server = machines.run(1, [sys.executable, "-c", LISTEN, machines.address(1)])
    assert server.stdout.readline() == "listens\n"
    connect = (sys.executable, "-c", CONNECT, machines.address(1))
    assert said(machines, 0, *connect) == "reached"
    machines.cut(1)
    _, err = machines.run(0, connect).communicate(timeout=20)
    assert "TimeoutError" in err  # not refused
    machines.heal(1)
    assert said(machines, 0, *connect) == "reached"
    machines.kill(1)
    server.communicate()
    assert server.returncode == -signal.SIGKILL


def test_a_machine_that_lost_its_power_keeps_its_disk_alone(machines):
    said(machines, 1, "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &")
    said(machines, 1, "touch", machines.own / "kept", "/dev/shm/lost")
    before = machines.processes(1)
    assert "sleep" in {p.name() for p in before}
    machines.kill(1)
    assert not [p for p in before if p.is_running()]
    assert (machines.on(1), machines.processes(1)) == (False, [])
    machines.boot(1)
    assert said(machines, 1, "ls", machines.own, "/dev/shm").split() == ["/dev/shm:", f"{machines.own}:", "kept"]


def test_nothing_is_left_after_an_exception():
    machines = Machines(1)
    processes = []

    def break_off():
        with machines:
            machines.boot(0)
            processes.extend(machines.processes(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert len(processes) == 1
    assert not [p for p in processes if p.is_running()]
    assert not machines.folder.exists()
    assert str(machines.folder) not in Path("/proc/mounts").read_text()


def test_machines_end_with_their_maker_and_the_next_removes_the_folder():
    maker = subprocess.Popen([sys.executable, "-c", LEFT], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    folder, *pids = maker.stdout.readline().split()
    processes = [psutil.Process(int(pid)) for pid in pids]
    assert len(processes) == 3  # the first one, the shell, its sleep
    remove_left()
    assert Path(folder).exists()  # it is in use
    maker.kill()
    maker.communicate()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert Path(folder).exists()
    remove_left()
    assert not Path(folder).exists()
    assert folder not in Path("/proc/mounts").read_text()
