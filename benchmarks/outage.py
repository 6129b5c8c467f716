"""A real MLflow server on this machine that goes away for a while: stopped, or gone."""

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from orchestrator.cluster import processes, services
from pipelines.errors import ClusterError

Kind = Literal["refused", "hung"]


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

    def leave(self, kind: Kind) -> None:
        """refused: it is killed, and its port closed. hung: it stands still, and its port takes connections."""
        number = signal.SIGKILL if kind == "refused" else signal.SIGSTOP
        while found := processes.members(self._service):
            for process in found:
                process.send_signal(number)
            if number == signal.SIGSTOP:
                return
            time.sleep(0.01)

    def come_back(self, kind: Kind) -> None:
        """Returns when it answers."""
        if kind == "refused":
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
