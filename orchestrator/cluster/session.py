"""Joining a Ray cluster, or starting one inside this process, and what is there; settings are in environment.py."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from orchestrator.cluster.services import sessions_folder
from orchestrator.config import ClusterConfig
from pipelines.errors import ClusterError

PROBE_S = 5.0
OPEN = "warning: this cluster asks for no token: whoever reaches it can run commands on its nodes (infra/SECURITY.md)"
REACH_S = 1.0


@dataclass(frozen=True)
class Node:
    """A living node."""

    id: str
    address: str
    cpus: float
    gpus: float
    port: int = 0  # of its raylet
    memory: float = 0.0  # bytes that it offers

    def fits(self, cpus: int, gpus: int) -> int:
        """How many workers of this size it holds."""
        by_cpu = int(self.cpus // cpus)
        return min(by_cpu, int(self.gpus // gpus)) if gpus else by_cpu


@contextmanager
def session(cpus: int, say: Callable[[str], None] = print) -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS names; without one, starts one with `cpus` logical CPUs and ends it at exit.

    Inside another session it is that one. Says so where the cluster asks for no token. Raises ClusterError where it
    does not answer.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    joined = bool(address)
    _probe(address)
    try:
        if joined:
            ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=_runtime_env())
        else:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=200 * 2**20,
                _temp_dir=str(sessions_folder()),
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(_no_entry(address, str(error).splitlines()[0])) from error
    _quiet()
    if joined and not is_token_auth_enabled():
        say(OPEN)
    try:
        yield
    finally:
        ray.shutdown()


def _no_entry(address: str, said: str) -> str:
    """Ray says the same of a wrong token as of a cluster that is away; `_probe` has found that somebody listens."""
    if not address:
        return (
            f"Ray did not start inside this process: {said}; start a cluster (python -m jobs.local up) and submit to it"
        )
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return (
        f"RAY_ADDRESS is {address}, and Ray there does not take this driver: {said}; check that {token} "
        f"(RAY_AUTH_TOKEN_PATH) is the token that its `ray start` was given, and that the cluster is well"
    )


def _quiet() -> None:
    """No raylet's words among a run's own: dozens of lines of state for each node that is lost, which Ray prints in
    every driver whatever log_to_driver says. They are in Ray's logs."""
    ray._private.worker._worker_logs_enabled = False


def _probe(address: str) -> None:
    """Raises ClusterError where nobody listens at HOST:PORT: Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # 'auto', 'local', or empty: Ray finds its own
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS is {address}, where nobody answers ({error.strerror or error}); start the cluster, correct "
            f"the address, or unset it to start one inside this process"
        ) from error


def nodes() -> list[Node]:
    """The nodes alive now."""
    return [
        Node(
            n["NodeID"],
            n["NodeManagerAddress"],
            n["Resources"].get("CPU", 0.0),
            n["Resources"].get("GPU", 0.0),
            n["NodeManagerPort"],
            n["Resources"].get("memory", 0.0),
        )
        for n in ray.nodes()
        if n["Alive"]
    ]


def reachable(found: Sequence[Node]) -> list[Node]:
    """Those whose raylet takes a connection within REACH_S. Ray itself knows of a lost node only seconds later."""
    with ThreadPoolExecutor(max(1, min(len(found), 64))) as pool:
        return [node for node, answers in zip(found, pool.map(_answers, found), strict=True) if answers]


def _answers(node: Node) -> bool:
    try:
        socket.create_connection((node.address, node.port), timeout=REACH_S).close()
    except OSError:
        return False
    return True


def draining() -> set[str]:
    """Ids of nodes that were told to go: a spot instance that is taken back, a pod that is ended, `ray drain-node`.

    Ray has no public call for it outside of a worker, where it is a barrier for all ranks; this is what that uses.
    """
    return set(ray._private.state.state.get_draining_nodes())


def job_id() -> str:
    """Ray's own id of this driver's job."""
    return str(ray.get_runtime_context().get_job_id())


def free() -> dict[str, dict[str, float]]:
    """Node id -> resources that nobody uses there now. Ray's public call adds them up, and a sum is no place: what is
    free may lie in pieces, or on a node that is of no use."""
    return dict(ray._private.state.state.available_resources_per_node())


def gpus_of(cluster: ClusterConfig) -> int:
    """GPUs of a worker: by cluster.device; auto: one where a node has any now."""
    return int(cluster.device == "gpu" or (cluster.device == "auto" and any(node.gpus for node in nodes())))


def choose_workers(span: tuple[int, int], found: list[Node], cpus: int, gpus: int) -> int:
    """As many workers as fit, within `span`. Raises ClusterError where even the least do not."""
    fits, (least, most) = sum(node.fits(cpus, gpus) for node in found), span
    if fits >= least:
        return min(fits, most)
    has = ", ".join(f"{n.address}: {n.cpus:g} CPUs {n.gpus:g} GPUs" for n in found)
    each = f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
    raise ClusterError(
        f"cluster.workers asks for {least} workers of {each} each; the cluster has room for {fits} ({has}); "
        f"ask for {fits or 'fewer CPUs each'} or add nodes"
    )


def _runtime_env() -> dict[str, str] | None:
    """Ships the code where the driver is no submitted job; a job has its working directory already."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    return {"working_dir": str(Path(__file__).parent.parent.parent)}
