"""Processes are found again by what they are, and only those that were started are ended."""

import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster import processes

SLEEP = "import time; time.sleep(600)"
# A grandchild in a session of its own whose parent is gone, as Ray's job drivers are. The child waits for it to start.
ORPHAN = (
    "import subprocess, sys;"
    f"p = subprocess.Popen([sys.executable, '-c', 'print(1, flush=True); {SLEEP}'], stdout=subprocess.PIPE,"
    "start_new_session=True); p.stdout.readline(); print(p.pid, flush=True)"
)
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {SLEEP}"


def launch(code: str, folder: Path, mark: str) -> processes.Started:
    """Marked with the test's own folder: another run of the tests beside this one has processes of its own."""
    return processes.start([sys.executable, "-c", code], os.environ, f"{folder}/{mark}", folder / f"{mark}.log")


def wait_for(log: str) -> str:
    """The first line of a log; the test's own timeout ends a wait that has no end."""
    while not (text := Path(log).read_text()).endswith("\n"):
        pass
    return text.strip()


def test_started_process_is_alive_until_ended(tmp_path: Path) -> None:
    service = launch(SLEEP, tmp_path, "a")
    assert processes.alive(service)
    assert [p.pid for p in processes.members(service)] == [service.pid]
    processes.end(service)
    assert not processes.alive(service)
    assert not psutil.pid_exists(service.pid)
    processes.end(service)  # again: nothing to do


def test_orphan_in_another_session_is_found_by_its_mark(tmp_path: Path) -> None:
    service = launch(ORPHAN, tmp_path, "b")
    orphan = int(wait_for(service.log))
    psutil.Process(service.pid).wait()
    assert not processes.alive(service)
    assert os.getsid(orphan) != service.pid
    assert [p.pid for p in processes.members(service)] == [orphan]
    processes.end(service)
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


def test_deaf_process_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ENDING", [(signal.SIGTERM, True, 0.1), (signal.SIGKILL, False, 30.0)])
    service = launch(DEAF, tmp_path, "c")
    assert wait_for(service.log) == "ready"
    processes.end(service)
    assert not processes.alive(service)


def test_another_process_with_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    """A pid is used again after a reboot: the creation time tells."""
    service = launch(SLEEP, tmp_path, "d")
    stranger = replace(service, created=service.created - 3600, mark="another")
    assert not processes.alive(stranger)
    assert processes.members(stranger) == []
    processes.end(stranger)
    assert processes.alive(service)
    processes.end(service)


def test_own_process_is_never_a_member(tmp_path: Path) -> None:
    service = launch(SLEEP, tmp_path, "e")
    others = {p.pid for p in psutil.process_iter()} - {service.pid}
    assert not others & {p.pid for p in processes.members(service)}
    processes.end(service)


def test_holder_names_who_listens() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert processes.holder(port) == f"process {os.getpid()} ({psutil.Process().name()})"
    assert processes.holder(port) is None


def test_log_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert processes.tail(log) == ""
    log.write_text("".join(f"{i}\n" for i in range(9)))
    assert processes.tail(log, 2) == "7\n8"


def test_services_output_goes_to_its_log(tmp_path: Path) -> None:
    service = launch("import sys; print('out'); print('err', file=sys.stderr)", tmp_path, "f")
    psutil.Process(service.pid).wait()
    assert sorted(Path(service.log).read_text().split()) == ["err", "out"]
