"""Joining a Ray cluster, or starting one inside this process, and what is there.

Every setting of Ray that Skiplane relies on for a driver is here; those of `ray start` are in local.py. Each was
measured: Ray 2.60 polls its workers every 2 s and prints every line twice unless told otherwise.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import ClusterError

DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is seen this soon, and an end too
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less a group
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where their modules are
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in DRIVER_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)  # before ray.train is imported: it reads some of them at import

import ray  # noqa: E402


@dataclass(frozen=True)
class Node:
    """A living node."""

    id: str
    address: str
    cpus: float
    gpus: float

    def fits(self, cpus: int, gpus: int) -> int:
        """How many workers of this size it holds."""
        by_cpu = int(self.cpus // cpus)
        return min(by_cpu, int(self.gpus // gpus)) if gpus else by_cpu


@contextmanager
def session(cpus: int, home: Path) -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS names; without one, starts one with `cpus` logical CPUs and ends it at exit.

    Inside another session it is that one. Raises ClusterError where the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    joined = bool(os.environ.get("RAY_ADDRESS"))
    if not joined:
        _own_token(home)
    try:
        if joined:
            ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=_runtime_env())
        else:
            ray.init(address="local", num_cpus=cpus, include_dashboard=True, dashboard_host="127.0.0.1",
                     object_store_memory=200 * 2**20, log_to_driver=False, logging_level="ERROR")  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "a local cluster")
        raise ClusterError(f"RAY_ADDRESS: Ray at {where} does not answer: {str(error).splitlines()[0]}; check that the "
                           f"cluster is up and that RAY_AUTH_TOKEN_PATH names its token") from error  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """The nodes alive now."""
    return [
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0))
        for n in ray.nodes()
        if n["Alive"]
    ]


def free() -> dict[str, float]:
    """Resources that nobody uses now."""
    return dict(ray.available_resources())


def choose_workers(span: tuple[int, int], found: list[Node], cpus: int, gpus: int) -> int:
    """As many workers as fit, within `span`. Raises ClusterError where even the least do not."""
    fits, (least, most) = sum(node.fits(cpus, gpus) for node in found), span
    if fits >= least:
        return min(fits, most)
    has = ", ".join(f"{n.address}: {n.cpus:g} CPUs {n.gpus:g} GPUs" for n in found)
    each = f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
    raise ClusterError(f"cluster.workers asks for {least} workers of {each} each; the cluster has room for {fits} ({has}); "
                       f"ask for {fits or 'fewer CPUs each'} or add nodes")  # fmt: skip


def _own_token(home: Path) -> None:
    """Ray's token on, in our own file of mode 0600: Ray's own would be world-readable."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    from orchestrator.cluster.local import token_file

    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file(home))
    os.environ["RAY_AUTH_MODE"] = "token"


def _runtime_env() -> dict[str, str] | None:
    """Ships the code where the driver is no submitted job; a job has its working directory already."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    return {"working_dir": str(Path(__file__).parent.parent.parent)}
