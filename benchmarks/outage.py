"""A real MLflow server on this machine that goes away for a while: stopped, or gone."""

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.cluster import processes, services
from pipelines.errors import ClusterError

# refused: it is killed, and its port closed. hung: it stands still, and its port takes connections.
OUTAGES = {"refused": signal.SIGKILL, "hung": signal.SIGSTOP}


class Server:
    """MLflow over SQLite in a folder, as `jobs.local up` starts it, on a free port."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._log = folder, folder / "server.log"
        self._ports = {"mlflow": processes.free_port()}
        self.uri = services.url("mlflow", self._ports)

    def start(self) -> None:
        """Returns when it answers. Raises ClusterError where it ends instead."""
        command = services.command("mlflow", self._folder, self._ports, "")
        surroundings = {**os.environ, **services.MLFLOW_SETTINGS}
        self._service = processes.start(command, surroundings, secrets.token_hex(16), self._log)
        while not services.ready("mlflow", self._folder, self._ports):
            if not processes.alive(self._service):
                raise ClusterError(f"the MLflow server ended; its last words:\n{processes.tail(self._log, 20)}")
            time.sleep(0.1)

    def leave(self, outage: str) -> None:
        """Until it comes back; `outage` as in OUTAGES."""
        for process in processes.members(self._service):
            process.send_signal(OUTAGES[outage])
        while outage == "refused" and processes.members(self._service):
            time.sleep(0.01)

    def come_back(self, outage: str) -> None:
        """Returns when it answers."""
        if outage == "refused":
            self.start()
            return
        for process in processes.members(self._service):
            process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """For good."""
        processes.end(self._service)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server while the context lasts."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.end()
