"""Which process drives a run, told from every other that ever was. In the same process table it can be looked for."""

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ENDED = -1  # in place of a start: a process that has ended and whose parent has not asked yet


@dataclass(frozen=True)
class Driver:
    """A process. Containers and network namespaces may have equal host names and equal pids, so both say little:
    `table` names the boot of the machine and the namespace that counts the pids."""

    id: str  # drawn at random
    host: str
    table: str  # empty where it cannot be known
    pid: int
    started: int  # clock ticks after the boot: a date would change with the clock

    @classmethod
    def this(cls) -> Self:
        """This process, with a new id."""
        return cls(uuid.uuid4().hex, socket.gethostname(), _table(), os.getpid(), _started(os.getpid()) or 0)

    def surely_dead(self) -> bool:
        """Whether it ran in this very process table and is gone; False where that cannot be known."""
        if not self.table or (self.host, self.table) != (socket.gethostname(), _table()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's, and there
        return _started(self.pid) not in (self.started, None)


def _table() -> str:
    try:
        if Path("/proc/self").readlink().name != str(os.getpid()):
            return ""  # /proc shows the processes of another namespace
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Clock ticks from the boot to a process's start, or ENDED; None where /proc does not show it."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return ENDED if state in (b"Z", b"X") else int(rest[18])
