"""The one-machine cluster: a Ray head and an MLflow server that belong to a user, not to a checkout.

Everything lies in `$SKIPLANE_HOME/local/`: `cluster.json` (what was started: pids and creation times), `token` (0600),
`env.sh`, `logs/`. How the two are started and asked is in services.py, how processes are found and ended in
processes.py.
"""

import fcntl
import json
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orchestrator.cluster import processes, services
from orchestrator.cluster.processes import Started
from orchestrator.cluster.services import DEFAULT_PORTS, HOST, NAMES, token_file
from pipelines.errors import ClusterError

__all__ = ["DEFAULT_PORTS", "HOST", "NAMES", "Cluster", "down", "load", "token_file", "up"]

READY_TIMEOUT_S = 180.0
SAY_EVERY_S = 10.0
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

    def url(self, name: str) -> str:
        """A service's page."""
        return services.url(name, self.ports)

    def running(self, name: str) -> bool:
        """Whether the service that was started still runs."""
        return name in self.services and processes.alive(self.services[name])


def up(home: Path, asked: Mapping[str, int], say: Say) -> Cluster:
    """Starts what does not run yet, side by side, and waits until both answer.

    `asked`: ports that the user named ("ray", "dashboard", "mlflow"). Raises ClusterError where a port is taken (then
    nothing is started), where the cluster is up with another port, and where a service ends or does not answer.
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
        script = cluster.folder / "env.sh"
        services.replace_private(script, services.shell_lines(home, cluster.ports))
        say(f"To use it from this shell:  source {shlex.quote(str(script))}")
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
    started = {name: Started(**values) for name, values in raw["services"].items()}
    return Cluster(home, raw["ports"], started, raw["ray_temp"])


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
        _clear(cluster, names)
        _save(began)
        raise
    return cluster


def _start(cluster: Cluster, name: str) -> Cluster:
    log = cluster.folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Short: a Unix socket in it may have 107 bytes of path. Private: Ray opens its own folder to everybody.
    temp = tempfile.mkdtemp(prefix="skiplane-", dir="/tmp") if name == "ray" else cluster.ray_temp
    cluster = replace(cluster, ray_temp=temp)
    command = services.command(name, cluster.home, cluster.ports, temp)
    surroundings = services.environment(cluster.home, cluster.ports, os.environ)
    started = processes.start(command, surroundings, secrets.token_hex(16), log)
    return replace(cluster, services={**cluster.services, name: started})


# -- waiting -----------------------------------------------------------------------------------------------------------


def _wait_ready(cluster: Cluster, names: list[str], say: Say) -> None:
    began, said, waiting = time.monotonic(), 0.0, list(names)
    while waiting:
        for name in list(waiting):
            _refuse_dead(cluster, name)
            if services.ready(name, cluster.home, cluster.ports):
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


# -- ports and files ---------------------------------------------------------------------------------------------------


def _ports(cluster: Cluster, asked: Mapping[str, int], missing: list[str]) -> dict[str, int]:
    """Those asked for, else the default; once a service runs, the ports it was told of are the cluster's."""
    if len(missing) == len(NAMES):
        return {name: asked.get(name, default) for name, default in DEFAULT_PORTS.items()}
    for name, port in asked.items():
        if port != cluster.ports[name]:
            raise ClusterError(f"--{name}-port is {port}, but the cluster is up with {cluster.ports[name]}; "
                               f"end it first (python -m jobs.local down)")  # fmt: skip
    return cluster.ports


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
            shutil.move(str(Path(cluster.ray_temp, "ray", "session_latest").resolve() / "logs"), kept)
        shutil.rmtree(cluster.ray_temp, ignore_errors=True)


def _save(cluster: Cluster) -> None:
    started = {name: asdict(service) for name, service in cluster.services.items()}
    text = json.dumps({"ports": cluster.ports, "ray_temp": cluster.ray_temp, "services": started}, indent=1)
    services.replace_private(cluster.folder / "cluster.json", text)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time; the lock goes with its process."""
    folder = services.private_folder(home)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ClusterError(f"another `jobs.local` is at work in {folder}; wait until it is done") from error
        yield
