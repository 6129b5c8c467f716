"""The one-machine cluster: a Ray head and an MLflow server that belong to a user, not to a checkout.

Everything lies in `$SKIPLANE_HOME/local/`: `cluster.json` (what was started: pids and creation times), `token` (0600),
`env.sh`, `logs/`. Both services listen on this machine alone where Ray lets them: its control ports (GCS, raylet) bind
every interface and are guarded by the token; its metrics ports are not guarded, and hold no secrets.
"""

import fcntl
import http.client
import json
import os
import secrets
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orchestrator.cluster import processes
from orchestrator.cluster.processes import Started
from pipelines.errors import ClusterError, ConfigError

HOST = "127.0.0.1"
# Ray replaces 127.0.0.1 by the address of the network card, which a laptop loses with its Wi-Fi, and which others can
# reach. This is the loopback device as well.
NODE_IP = "127.0.0.2"
OBJECT_STORE_BYTES = 256 * 2**20  # nothing large goes through it; Ray's default takes 30 % of the memory
READY_TIMEOUT_S = 180.0
SAY_EVERY_S = 10.0
# Of the shell, what would lead the services astray.
FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "MLFLOW_TRACKING_URI",
)
RAY_SETTINGS = {
    "RAY_worker_niceness": "0",  # by default training runs at niceness 15: anything else on the machine starves it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else an idle helper actor holds `down` for 30 s
    # Read by jobs: a stop is Ctrl-C, and leaves time for a checkpoint.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
MLFLOW_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 processes instead of 15
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}
DEFAULT_PORTS = {"ray": 6379, "dashboard": 8265, "mlflow": 5000}
NAMES = {"ray": "Ray", "mlflow": "MLflow"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """What `cluster.json` says: ports by name, services by name, and where Ray keeps its session."""

    home: Path
    ports: dict[str, int]
    services: dict[str, Started]
    ray_temp: str = ""

    @property
    def folder(self) -> Path:
        """`$SKIPLANE_HOME/local`."""
        return self.home / "local"

    @property
    def dashboard_url(self) -> str:
        """Where jobs are submitted to."""
        return f"http://{HOST}:{self.ports['dashboard']}"

    @property
    def mlflow_url(self) -> str:
        """The tracking URI, and the page to browse."""
        return f"http://{HOST}:{self.ports['mlflow']}"

    def url(self, name: str) -> str:
        """A service's page."""
        return self.dashboard_url if name == "ray" else self.mlflow_url

    def running(self, name: str) -> bool:
        """Whether the service that was started still runs."""
        return name in self.services and processes.alive(self.services[name])


def up(home: Path, asked: Mapping[str, int], say: Say) -> Cluster:
    """Starts what does not run yet, side by side, and waits until both answer.

    `asked`: ports that the user named ("ray", "dashboard", "mlflow"). Raises ClusterError where a port is taken (then
    nothing is started), where a service runs on another port than asked, and where one ends or does not answer.
    """
    with _locked(home):
        cluster = load(home)
        missing = [name for name in NAMES if not cluster.running(name)]
        cluster = replace(cluster, ports=_ports(cluster, asked, missing))
        if not missing:
            say("The local cluster is up already:")
        else:
            _clear(cluster, missing)
            _refuse_taken(cluster, missing)
            cluster = _start_all(cluster, missing, say)
        for name in NAMES:
            say(f"  {NAMES[name]:<8}{cluster.url(name)}")
        say(f"To use it from this shell:  source {shlex.quote(str(_write_env(cluster)))}")
        return cluster


def down(home: Path, say: Say) -> None:
    """Ends what `up` started, and nothing else; logs stay. Raises ClusterError where a process cannot be ended."""
    with _locked(home):
        cluster = load(home)
        if not any(processes.members(service) for service in cluster.services.values()):
            say("The local cluster is down.")
        for name, service in cluster.services.items():  # Ray first: its jobs' last words go to MLflow
            if processes.members(service):
                processes.end(service)
                say(f"{NAMES[name]} has ended.")
        _clear(cluster, list(NAMES))
        for file in ("cluster.json", "env.sh"):
            (cluster.folder / file).unlink(missing_ok=True)


def load(home: Path) -> Cluster:
    """What was started, whether it still runs or not."""
    try:
        raw = json.loads((home / "local" / "cluster.json").read_text())
    except FileNotFoundError:
        return Cluster(home, dict(DEFAULT_PORTS), {})
    services = {name: Started(**values) for name, values in raw["services"].items()}
    return Cluster(home, raw["ports"], services, raw["ray_temp"])


def token_file(home: Path) -> Path:
    """The file with Ray's token, mode 0600; made where there is none (Ray would make its own readable by all)."""
    path = home / "local" / "token"
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        _create_private(path, secrets.token_hex(32))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(
            f"{path} can be read by other users; delete it while the cluster is down, and a new one is made"
        )
    return path


# -- starting ----------------------------------------------------------------------------------------------------------


def _start_all(cluster: Cluster, names: list[str], say: Say) -> Cluster:
    say(f"Starting {' and '.join(NAMES[n] for n in names)} (logs in {cluster.folder / 'logs'}) ...")
    began = cluster
    try:
        for name in names:
            cluster = _start(cluster, name)
            _save(cluster)  # before anything can go wrong: what is noted can be ended
        _wait_ready(cluster, names, say)
    except BaseException:  # Ctrl-C too: half a cluster is left to nobody
        for name in names:
            if name in cluster.services:
                processes.end(cluster.services[name])
        _clear(cluster, names)
        _save(began)
        raise
    return cluster


def _start(cluster: Cluster, name: str) -> Cluster:
    log = cluster.folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    temp = tempfile.mkdtemp(prefix="skiplane-") if name == "ray" else cluster.ray_temp
    cluster = replace(cluster, ray_temp=temp)
    command = ray_command(cluster) if name == "ray" else mlflow_command(cluster)
    started = processes.start(command, environment(cluster, os.environ), secrets.token_hex(16), log)
    return replace(cluster, services={**cluster.services, name: started})


def ray_command(cluster: Cluster) -> list[str]:
    """The head. Its session lies in a private folder with a short name: a Unix socket's path may have 107 bytes."""
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--node-ip-address={NODE_IP}",
            f"--port={cluster.ports['ray']}", f"--dashboard-host={HOST}", f"--dashboard-port={cluster.ports['dashboard']}",
            "--dashboard-agent-listen-port=0", f"--ray-client-server-port={processes.free_port()}",
            "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={cluster.ray_temp}", "--log-style=record", "--log-color=false"]  # fmt: skip


def mlflow_command(cluster: Cluster) -> list[str]:
    """The tracking server: one worker, runs in SQLite, artifacts in a folder."""
    return [sys.executable, "-m", "mlflow", "server", f"--host={HOST}", f"--port={cluster.ports['mlflow']}", "--workers=1",
            f"--backend-store-uri=sqlite:///{cluster.home / 'mlflow.db'}",
            f"--default-artifact-root={cluster.home / 'mlartifacts'}"]  # fmt: skip


def environment(cluster: Cluster, shell: Mapping[str, str]) -> dict[str, str]:
    """The environment of both services. Jobs inherit it from Ray's head, and nothing from the shell that submits them."""
    inherited = {name: value for name, value in shell.items() if name not in FOREIGN}
    return inherited | RAY_SETTINGS | MLFLOW_SETTINGS | {
        "PATH": f"{_bin()}{os.pathsep}{shell.get('PATH', os.defpath)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file(cluster.home)),
        "SKIPLANE_HOME": str(cluster.home),
        "MLFLOW_TRACKING_URI": cluster.mlflow_url,
    }  # fmt: skip


def _bin() -> Path:
    """The folder of this Python: `python` and `ray` have to be this environment's in a job, too."""
    return Path(sys.executable).parent


# -- waiting -----------------------------------------------------------------------------------------------------------


def _wait_ready(cluster: Cluster, names: list[str], say: Say) -> None:
    began, said, waiting = time.monotonic(), 0.0, list(names)
    while waiting:
        for name in list(waiting):
            _refuse_dead(cluster, name)
            if _ready(cluster, name):
                say(f"{NAMES[name]} answers after {time.monotonic() - began:.0f} s.")
                waiting.remove(name)
        seconds = time.monotonic() - began
        if waiting and seconds > READY_TIMEOUT_S:
            raise ClusterError(f"{NAMES[waiting[0]]} does not answer after {seconds:.0f} s; "
                               f"look at {cluster.services[waiting[0]].log}")  # fmt: skip
        if waiting and seconds - said > SAY_EVERY_S:
            said = seconds
            say(f"waiting for {' and '.join(NAMES[n] for n in waiting)}: {seconds:.0f} s")
        time.sleep(0.2)


def _refuse_dead(cluster: Cluster, name: str) -> None:
    if not cluster.running(name):
        log = cluster.services[name].log
        raise ClusterError(
            f"{NAMES[name]} ended while it was starting; the last lines of {log}:\n{processes.tail(Path(log))}"
        )


def _ready(cluster: Cluster, name: str) -> bool:
    """Ray: its node has registered, so that a job can be placed. MLflow: its health page."""
    if name == "mlflow":
        return _get(cluster.ports["mlflow"], "/health", {}) is not None
    token = token_file(cluster.home).read_text().strip()
    answer = _get(cluster.ports["dashboard"], "/api/v0/nodes", {"Authorization": f"Bearer {token}"})
    return answer is not None and json.loads(answer)["data"]["result"]["total"] > 0


def _get(port: int, path: str, headers: dict[str, str]) -> bytes | None:
    """The body of a 200; None otherwise. No proxy of the shell is asked: this is the own machine."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# -- ports and files ---------------------------------------------------------------------------------------------------


def _ports(cluster: Cluster, asked: Mapping[str, int], missing: list[str]) -> dict[str, int]:
    """Of running services the ports they have; of the others those asked for, else the default."""
    ports = {}
    for name, default in DEFAULT_PORTS.items():
        service = "mlflow" if name == "mlflow" else "ray"
        ports[name] = asked.get(name, default) if service in missing else cluster.ports[name]
        if asked.get(name, ports[name]) != ports[name]:
            raise ClusterError(f"--{name}-port is {asked[name]}, but {NAMES[service]} is up with {ports[name]}; "
                               f"end it first (python -m jobs.local down)")  # fmt: skip
    return ports


def _refuse_taken(cluster: Cluster, missing: list[str]) -> None:
    for name, port in cluster.ports.items():
        if ("mlflow" if name == "mlflow" else "ray") in missing and (who := processes.holder(port)):
            raise ClusterError(f"port {port} is in use by {who}; end that, or choose another with --{name}-port")


def _clear(cluster: Cluster, names: list[str]) -> None:
    """Removes what services that ended left: stray processes and Ray's session, of which the logs are kept."""
    for name in names:
        if name in cluster.services:
            processes.end(cluster.services[name])
    if "ray" in names and cluster.ray_temp:
        kept = cluster.folder / "logs" / "ray-session"
        shutil.rmtree(kept, ignore_errors=True)
        with suppress(OSError):
            shutil.move(str(Path(cluster.ray_temp, "session_latest").resolve() / "logs"), kept)
        shutil.rmtree(cluster.ray_temp, ignore_errors=True)


def _save(cluster: Cluster) -> None:
    services = {name: asdict(service) for name, service in cluster.services.items()}
    text = json.dumps({"ports": cluster.ports, "ray_temp": cluster.ray_temp, "services": services}, indent=1)
    _replace_private(cluster.folder / "cluster.json", text)


def _write_env(cluster: Cluster) -> Path:
    """What a shell needs to submit jobs: sourced, not guessed."""
    values = {
        "SKIPLANE_HOME": str(cluster.home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file(cluster.home)),
        "RAY_API_SERVER_ADDRESS": cluster.dashboard_url,
        "MLFLOW_TRACKING_URI": cluster.mlflow_url,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    folder = shlex.quote(str(_bin()))
    lines.append(f'case ":$PATH:" in *:{folder}:*) ;; *) export PATH={folder}:"$PATH" ;; esac')
    path = cluster.folder / "env.sh"
    _replace_private(path, "\n".join(lines) + "\n")
    return path


def _create_private(path: Path, text: str) -> None:
    """A new file of mode 0600; FileExistsError where there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _replace_private(path: Path, text: str) -> None:
    """A file of mode 0600, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    _create_private(partial, text)
    partial.replace(path)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time; the lock goes with its process."""
    folder = home / "local"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ClusterError(f"another `jobs.local` is at work in {folder}; wait until it is done") from error
        yield
