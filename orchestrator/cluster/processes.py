"""Processes that outlive the command that started them: started with a mark, found again by it, ended for certain.

A process is known by its pid and its time of creation, because pids are used again. Its descendants are known by a mark
in their environment, which they inherit: Ray's workers and job drivers leave the session and lose their parents, but
not that. Nothing else is ever signalled.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.errors import ClusterError

MARK = "SKIPLANE_SERVICE"  # environment variable that every descendant of a service carries
# (signal, whether only the first process gets it, seconds until the next): Ray's head ends its own processes best.
ENDING = ((signal.SIGTERM, True, 12.0), (signal.SIGTERM, False, 3.0), (signal.SIGKILL, False, 5.0))

# Processes end while one looks at them, and those of other users cannot be looked at.
VANISHING = (psutil.Error, OSError)


@dataclass(frozen=True)
class Started:
    """One service that was started. `created`: the process's creation time as psutil gives it, seconds since 1970."""

    pid: int
    created: float
    mark: str
    log: str


def start(command: Sequence[str], environment: Mapping[str, str], mark: str, log: Path) -> Started:
    """Starts `command` in a session of its own (Ctrl-C in the terminal is not meant for it), output to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**environment, MARK: mark}, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent)  # fmt: skip
    process.returncode = 0  # nobody waits for it; else Popen complains, when it is collected, that it still runs
    return Started(process.pid, psutil.Process(process.pid).create_time(), mark, str(log))


def alive(service: Started) -> bool:
    """Whether the very process that was started still runs."""
    return _root(service) is not None


def members(service: Started) -> list[psutil.Process]:
    """The process that was started, where it still runs, and all processes that carry its mark."""
    root = _root(service)
    marked = [p for p in psutil.process_iter() if p.pid != service.pid and _carries(p, service.mark)]
    return ([root] if root else []) + marked


def end(service: Started) -> None:
    """Ends the service and its descendants, gently first. Raises ClusterError where some stay."""
    for number, only_first, seconds in ENDING:
        if not (found := members(service)):
            return
        _signal(found[:1] if only_first and alive(service) else found, number)
        _wait_empty(service, seconds)
    if left := members(service):
        raise ClusterError(f"processes {', '.join(str(p.pid) for p in left)} cannot be ended; look at {service.log}")


def holder(port: int) -> str | None:
    """None where nobody listens on this TCP port; else who does, as far as this user may see."""
    if _free(port):
        return None
    for connection in psutil.net_connections("tcp"):
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
        if listens and connection.pid:
            return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "a process of another user"


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(path.read_text(errors="replace").strip().splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def _root(service: Started) -> psutil.Process | None:
    with suppress(ChildProcessError):
        os.waitpid(service.pid, os.WNOHANG)  # a child of this very process that ended would stay as a zombie
    with suppress(*VANISHING):
        process = psutil.Process(service.pid)
        # A clock that is set moves psutil's creation times a little; a pid is not used again within a second.
        if abs(process.create_time() - service.created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _carries(process: psutil.Process, mark: str) -> bool:
    with suppress(*VANISHING):
        return bool(process.environ().get(MARK) == mark)
    return False


def _signal(found: list[psutil.Process], number: int) -> None:
    for process in found:
        with suppress(*VANISHING):
            process.send_signal(number)  # psutil makes sure that the pid still means this process


def _wait_empty(service: Started, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while members(service) and time.monotonic() < limit:
        time.sleep(0.1)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
