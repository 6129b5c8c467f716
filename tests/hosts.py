"""Real hosts of a Ray cluster on this one machine: what dies, falls silent or comes back is a machine, not a mock.

    with Hosts(cpus=(0, 1, 1)) as hosts:  # host 0 is the head
        hosts.wait(3)
        driver = hosts.run(0, [sys.executable, "-m", "jobs.train", ...])
        hosts.kill(2)  # its power is gone
        hosts.add(2)  # and back

What a host is stands in `machines.py`. PID namespaces matter for Ray: a driver scans the process table for "its" node
and prefers a head, so with one table for all a driver beside a worker node takes the head's address and hangs.
"""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.machines import ROOT, Machines
from tests.machines import supported as supported

OBJECT_STORE_BYTES = 100 * 2**20
# Ray's sockets lie below its folder, and a socket's path has at most 107 bytes.
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
NODES = """
import sys, urllib.request
page, token = sys.argv[1:]
asked = urllib.request.Request(page, headers={"Authorization": "Bearer " + open(token).read()})
print(urllib.request.urlopen(asked, timeout=3).read().decode())
"""


def shipped(file: Path = ROOT / "infra" / "ray.env") -> dict[str, str]:
    """The environment of `ray start` that ships."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


class Hosts(Machines):
    """Hosts that are up, each with a Ray node, while the context lasts.

    cpus: of each host as Ray counts them. settings: the environment of `ray start`, on top of what ships.
    shared_mb: size of the folder `shared`, a file system of its own, so that it can be full.
    """

    def __init__(
        self, cpus: Sequence[int] = (0, 1, 1), settings: Mapping[str, str] | None = None, shared_mb: int = 256
    ) -> None:
        super().__init__(len(cpus), shared_mb)
        self.cpus, self.settings = tuple(cpus), shipped() | dict(settings or {})
        self.options: list[str] = []  # more of `ray start`
        self._nodes: dict[int, subprocess.Popen] = {}

    def begin(self) -> None:
        """Turns all hosts on; returns before their nodes have joined."""
        if len(f"{self.own}{SOCKET}") > 107:
            raise ValueError(f"{self.folder} is too long a path for Ray's sockets; set TMPDIR to a shorter one")
        self.token = self.folder / "token"
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))
        for i in range(self.count):
            self.add(i)

    def add(self, i: int) -> None:
        """Turns host i on where it is off, and starts its node where none runs; returns before it has joined."""
        if not self.on(i):
            self.boot(i)
        if not self.serves(i):
            self._nodes[i] = self._ray_start(i)

    def kill(self, i: int) -> None:
        """Host i loses its power: SIGKILL for every process at once."""
        super().kill(i)
        if node := self._nodes.pop(i, None):
            node.wait()

    def serves(self, i: int) -> bool:
        """Whether host i's `ray start` runs: it ends where the cluster has given the node up."""
        return self.on(i) and i in self._nodes and self._nodes[i].poll() is None

    def workers(self, i: int) -> list[psutil.Process]:
        """The training workers on host i, by the title that Ray gives them."""
        return [p for p in self.processes(i) if "RayTrainWorker" in _title(p)]

    def alive(self) -> int:
        """Nodes that the cluster counts as alive; 0 where nobody answers."""
        page = f"http://{self.address(0)}:8265/api/v0/nodes"
        asked = self.run(0, [sys.executable, "-c", NODES, page, str(self.token)])
        answer, _ = asked.communicate()
        if asked.returncode:
            return 0
        return sum(node["state"] == "ALIVE" for node in json.loads(answer)["data"]["result"]["result"])

    def wait(self, nodes: int, seconds: float = 120.0) -> None:
        """Until so many are alive. Raises TimeoutError with the end of every node's log."""
        limit = time.monotonic() + seconds
        while (found := self.alive()) != nodes:
            if time.monotonic() > limit:
                logs = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log")))
                raise TimeoutError(f"{found} nodes are alive, not {nodes}, after {seconds:.0f} s\n{logs}")
            time.sleep(0.5)

    def environment(self) -> dict[str, str]:
        """What a driver needs to join, from any host."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return super().environment() | {"RAY_ADDRESS": f"{self.address(0)}:6379"} | token

    def _ray_start(self, i: int) -> subprocess.Popen:
        head = ["--head", "--port=6379", f"--dashboard-host={self.address(0)}"]
        place = [f"--address={self.address(0)}:6379"] if i else head
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-color=false", *place,
                   f"--node-ip-address={self.address(i)}", f"--num-cpus={self.cpus[i]}",
                   f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self.own}/ray",
                   *self.options]  # fmt: skip
        with (self.folder / f"node{i}.log").open("ab") as log:
            return self._run(i, command, self.settings, stdout=log, stderr=subprocess.STDOUT)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
