"""Machines on this machine: namespaces with an address, a name, a disk and processes of their own, on one switch.

A machine's network namespace has a cable to the switch, its UTS namespace a name, its mount namespace a private disk
under a path that all share and a private /dev/shm, and its PID namespace ends all of it at once. The switch is one more
network namespace: the real machine's own network is left alone, and two sets never meet.

The first process of each reads a pipe that this process holds, so machines end with whoever made them, however that
ends. What can stay behind is the folder: the next set removes those whose lock nobody holds.
"""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
PREFIX = "skh"  # of the folders
NETWORK = "10.83.0"
FIRST = 10  # machine 0 is 10.83.0.10
TOOLS = ("ip", "unshare", "nsenter", "mount", "umount")
SHELL = ("sh", "-ec")
APART = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *SHELL)
TRIAL = """
hostname trial
mount -t tmpfs tmpfs /tmp
ip link add name switch type bridge
ip link add name port type veth peer name cable
"""
SWITCH = """
ip link add name switch type bridge
ip addr add "$0.1/24" dev switch
ip link set switch up
echo up
exec cat
"""
# $0 name, $1 this machine's disk, $2 folder of all. Orphans vanish at their end where SIGCHLD is ignored.
BOOT = """
hostname "$0"
mount --bind "$1" "$2/own"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
trap '' CHLD
echo up
exec cat
"""
FOREIGN = ("RAY_", "MLFLOW_", "SKIPLANE_")  # of this process's environment: not for a machine


@functools.cache
def supported() -> str:
    """Why machines cannot be made here; "" where they can: it is tried."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"hosts of one's own need {', '.join(missing)} (iproute2, util-linux)"
    if os.geteuid():
        return "hosts of one's own need root: they are namespaces and mounts"
    tried = subprocess.run([*APART, TRIAL], capture_output=True, text=True)
    return f"this machine does not allow namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Machines:
    """`count` machines, off at first, while the context lasts. shared_mb: size of the file system that all see.

    Paths are the same on each: `shared`, and `own`, which is another disk everywhere. `disk(i)` is machine i's from
    outside.
    """

    working = ROOT  # where commands run

    def __init__(self, count: int, shared_mb: int = 256) -> None:
        self.count, self._shared_mb = count, shared_mb
        self._first: dict[int, subprocess.Popen] = {}
        self._pid: dict[int, int] = {}  # of the first process inside

    def __enter__(self):
        with ExitStack() as stack:
            self._make_folder(stack)
            self._switch = _start([*APART[:2], *SHELL, SWITCH, NETWORK], "the switch")
            stack.callback(_end, self._switch, self._switch.pid)
            stack.callback(lambda: [self.kill(i) for i in list(self._first)])
            self.begin()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def begin(self) -> None:
        """What a set starts with: nothing here."""

    def address(self, i: int) -> str:
        """Of machine i."""
        return f"{NETWORK}.{FIRST + i}"

    def disk(self, i: int) -> Path:
        """What machine i sees as `own`; it outlives its machine."""
        return self.folder / f"disk{i}"

    def name(self, i: int) -> str:
        """Of machine i, for itself and for the others."""
        return f"host{i}"

    def script(self, i: int) -> str:
        """What machine i's first process does: see BOOT."""
        return BOOT

    def on(self, i: int) -> bool:
        """Whether machine i has power."""
        return i in self._first and self._first[i].poll() is None

    def boot(self, i: int) -> None:
        """Turns machine i on, with its cable in."""
        self.disk(i).mkdir(exist_ok=True)
        self._first[i] = _start(
            [*APART, self.script(i), self.name(i), str(self.disk(i)), str(self.folder)], self.name(i)
        )
        self._pid[i] = _inner(self._first[i]).pid
        with suppress(subprocess.CalledProcessError):  # the kernel takes its time with a dead machine's cable
            self._at_switch("link", "del", f"port{i}")
        # The same hardware address every time: the others remember it for a minute.
        cable = ("peer", "name", f"cable{i}", "address", f"02:00:00:00:00:{FIRST + i:02x}")
        self._at_switch("link", "add", "name", f"port{i}", "type", "veth", *cable)
        self._at_switch("link", "set", f"cable{i}", "netns", str(self._pid[i]))
        self._at_switch("link", "set", f"port{i}", "master", "switch", "up")
        for words in (("link", "set", f"cable{i}", "name", "eth0"), ("link", "set", "lo", "up"),
                      ("addr", "add", f"{self.address(i)}/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
                      ("route", "add", "default", "via", f"{NETWORK}.1")):  # fmt: skip
            _ip(self._pid[i], *words)

    def kill(self, i: int) -> None:
        """Machine i loses its power: every process ends at once, what was in memory is gone, the disk stays."""
        _end(self._first.pop(i), self._pid.pop(i))

    def cut(self, i: int) -> None:
        """Pulls machine i's cable out of the switch: nothing arrives any more, and nobody is told."""
        self._at_switch("link", "set", f"port{i}", "down")

    def heal(self, i: int) -> None:
        """Plugs it in again; nothing happens where it was in, or the machine is off."""
        with suppress(subprocess.CalledProcessError):
            self._at_switch("link", "set", f"port{i}", "up")

    def run(self, i: int, command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Starts a command in the repository on machine i, its output in pipes, as text. It ends with the machine."""
        return self._run(i, command, environment or {}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def process(self, started: subprocess.Popen) -> psutil.Process:
        """What `run` started, once it has said something: the command itself, not what entered the machine for it."""
        return _inner(started)

    def processes(self, i: int) -> list[psutil.Process]:
        """All processes of machine i."""
        own = _namespace(self._pid[i]) if self.on(i) else None
        return [p for p in psutil.process_iter() if own and _namespace(p.pid) == own]

    def environment(self) -> dict[str, str]:
        """Of all that runs on a machine: this Python first, a home on the machine's own disk."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        home = {"HOME": str(self.own), "SKIPLANE_HOME": f"{self.own}/home"}
        return inherited | home | {"PATH": path, "PYTHONUNBUFFERED": "1"}

    def _run(self, i: int, command: Sequence[str], environment: Mapping[str, str], **how) -> subprocess.Popen:
        enter = ["nsenter", "--target", str(self._pid[i]), "--mount", "--uts", "--net", "--pid"]
        line = [*enter, "env", f"--chdir={self.working}", *map(str, command)]
        # A session of its own: Ctrl-C is for whoever made the machine.
        own = self.environment() | dict(environment)
        return subprocess.Popen(line, env=own, stdin=subprocess.DEVNULL, start_new_session=True, **how)

    def _make_folder(self, stack: ExitStack) -> None:
        remove_left()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        stack.enter_context(_locked(self.folder))
        self.own, self.shared = self.folder / "own", self.folder / "shared"
        self.own.mkdir()
        self.shared.mkdir()
        size = f"size={self._shared_mb}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.shared], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", self.shared], check=True)
        names = [f"{self.address(i)} {self.name(i)}\n" for i in range(self.count)]
        (self.folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
        # A resolver that cannot be reached costs 10 s a look-up.
        (self.folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")

    def _at_switch(self, *words: str) -> None:
        _ip(self._switch.pid, *words)


def remove_left() -> None:
    """Removes the folders of sets whose makers were killed; their machines ended with them."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        with suppress(BlockingIOError, FileNotFoundError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it up when its holder ends
            if os.path.ismount(shared := lock.parent / "shared"):
                subprocess.run(["umount", "--lazy", shared], check=True)
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: taken before it has the name that others look for."""
    with (folder / "lock.new").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock.new").rename(folder / "lock")
        yield


def _start(command: Sequence[str], name: str) -> subprocess.Popen:
    """A first process: it says that it is up, and lives until its input ends."""
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    if process.stdout.readline() != "up\n":
        said = process.stderr.read()
        _end(process, process.pid)
        raise OSError(f"{name} did not come up: {said}")
    return process


def _end(process: subprocess.Popen, pid: int) -> None:
    """Kills the first process inside; whoever waits for it returns when all others inside are gone too."""
    if process.poll() is None:
        os.kill(pid, 9)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with suppress(BrokenPipeError), closing(pipe):
            pass


def _inner(process: subprocess.Popen) -> psutil.Process:
    [inner] = psutil.Process(process.pid).children()
    return inner


def _namespace(pid: int) -> str | None:
    """The PID namespace of a process; None where it is gone."""
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    return None


def _ip(pid: int, *words: str) -> None:
    """`ip` in the network of a process."""
    command = ["nsenter", "--target", str(pid), "--net", "ip", *words]
    subprocess.run(command, check=True, capture_output=True, text=True)
