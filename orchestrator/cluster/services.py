"""The two services of the one-machine cluster: how each is started, when it is ready, what a shell needs to use it.

All that they open listens on the loopback device alone: infra/SECURITY.md has the table of it, and what Ray's token
guards and what it does not.
"""

import http.client
import json
import os
import secrets
import shlex
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from orchestrator.cluster.processes import free_port
from pipelines.errors import ConfigError

HOST = "127.0.0.1"
NAMES = {"ray": "Ray", "mlflow": "MLflow"}
DEFAULT_PORTS = {"ray": 6379, "dashboard": 8265, "mlflow": 5000}
OBJECT_STORE_BYTES = 256 * 2**20  # nothing large goes through it; Ray's default takes 30 % of the memory
# A node that does not answer for so long is lost: 3 times (1 s between, 1.5 s each). Ray's defaults take 62 s for one
# that is cut off. A node that stands still for longer than this, swapping say, is given up too, and costs a restart.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "3",
}
# Ray replaces 127.0.0.1 by the address of the network card, which a laptop loses with its Wi-Fi, unless it is told that
# there is no cluster of several machines. All of its servers listen on 127.0.0.1 alone then; with any other address,
# 127.0.0.2 too, its control ports listen on every interface, and who reaches them needs no token to end the head.
ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
RAY_SETTINGS = {
    **HEALTH_CHECKS,
    **ONE_MACHINE,
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
# Of the shell, what would lead the services astray.
FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "MLFLOW_TRACKING_URI",
)


def url(name: str, ports: Mapping[str, int]) -> str:
    """A service's page: where jobs are submitted to ("ray"), the tracking URI ("mlflow")."""
    return f"http://{HOST}:{ports['dashboard' if name == 'ray' else 'mlflow']}"


def command(name: str, home: Path, ports: Mapping[str, int], ray_temp: str) -> list[str]:
    """The command line of a service."""
    module, arguments = (
        ("ray.scripts.scripts", _ray(ports, ray_temp)) if name == "ray" else ("mlflow", _mlflow(home, ports))
    )
    return [sys.executable, "-m", module, *arguments]


def _ray(ports: Mapping[str, int], temp: str) -> list[str]:
    """The head, and no fixed port but those asked for: Ray's defaults would collide with another Ray here. Without the
    autoscaler's monitor, which has no machine to add: a process and a port less."""
    return ["start", "--head", "--block", "--no-monitor", f"--node-ip-address={HOST}", f"--port={ports['ray']}",
            f"--dashboard-host={HOST}", f"--dashboard-port={ports['dashboard']}", "--dashboard-agent-listen-port=0",
            f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={temp}/ray", "--log-color=false"]  # fmt: skip


def _mlflow(home: Path, ports: Mapping[str, int]) -> list[str]:
    """One server process. Artifacts lie in a folder that clients on this machine write to themselves, so that they are
    found whether runs were tracked through the server or in its database."""
    return ["server", f"--host={HOST}", f"--port={ports['mlflow']}", "--workers=1",
            f"--backend-store-uri=sqlite:///{home / 'mlflow.db'}",
            f"--default-artifact-root={home / 'mlartifacts'}"]  # fmt: skip


def environment(home: Path, ports: Mapping[str, int], shell: Mapping[str, str]) -> dict[str, str]:
    """The environment of both. Jobs inherit it from Ray's head, and nothing from the shell that submits them."""
    inherited = {name: value for name, value in shell.items() if name not in FOREIGN}
    own = {
        "PATH": f"{_bin()}{os.pathsep}{shell.get('PATH', os.defpath)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file(home)),
        "SKIPLANE_HOME": str(home),
        "MLFLOW_TRACKING_URI": url("mlflow", ports),
    }
    return inherited | RAY_SETTINGS | MLFLOW_SETTINGS | own


def shell_lines(home: Path, ports: Mapping[str, int]) -> str:
    """What a shell needs for `ray job submit`: the content of env.sh."""
    values = {
        **ONE_MACHINE,
        "SKIPLANE_HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file(home)),
        "RAY_API_SERVER_ADDRESS": url("ray", ports),
        "MLFLOW_TRACKING_URI": url("mlflow", ports),
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    folder = shlex.quote(str(_bin()))
    lines.append(f'case ":$PATH:" in *:{folder}:*) ;; *) export PATH={folder}:"$PATH" ;; esac')
    return "\n".join(lines) + "\n"


def ready(name: str, home: Path, ports: Mapping[str, int]) -> bool:
    """Ray: its node has registered, so that a job can be placed. MLflow: its health page."""
    if name == "mlflow":
        return _get(ports["mlflow"], "/health", {}) is not None
    token = token_file(home).read_text().strip()
    answer = _get(ports["dashboard"], "/api/v0/nodes", {"Authorization": f"Bearer {token}"})
    return answer is not None and json.loads(answer)["data"]["result"]["total"] > 0


def token_file(home: Path) -> Path:
    """The file with Ray's token, mode 0600; made where there is none (Ray would make its own readable by all)."""
    path = private_folder(home) / "token"
    with suppress(FileExistsError):
        create_private(path, secrets.token_hex(32))
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise ConfigError(f"{path} holds Ray's token and has mode {mode:04o}, which lets others read it; delete it "
                          f"while the cluster is down, and a new one is made")  # fmt: skip
    return path


def private_folder(home: Path) -> Path:
    """`$SKIPLANE_HOME/local`; what is made of the two, is for its user alone."""
    for folder in (home, home / "local"):
        folder.mkdir(0o700, parents=True, exist_ok=True)
    return home / "local"


def sessions_folder(place: Path = Path("/tmp")) -> Path:
    """Where Ray keeps the sessions of commands without a cluster, their sockets and code. Ray opens the folder that
    it is given to everybody; the one around it is its user's alone. Short: see local.py.

    Raises ConfigError where somebody else made it.
    """
    folder = place / f"skiplane-{os.geteuid()}"
    folder.mkdir(0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} is where Ray's sessions lie, and others can write there; remove it, and look who "
                          f"made it: it has to be a folder of yours, of mode 0700")  # fmt: skip
    return folder / "ray"


def create_private(path: Path, text: str) -> None:
    """A new file of mode 0600; FileExistsError where there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def replace_private(path: Path, text: str) -> None:
    """A file of mode 0600 in a folder that is there, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    create_private(partial, text)
    partial.replace(path)


def _bin() -> Path:
    """The folder of this Python: `python` and `ray` have to be this environment's in a job, too."""
    return Path(sys.executable).parent


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
