"""Room for a group: how many workers, on what, as the cluster is now. Never a silent wait."""

import time
from collections.abc import Callable

from orchestrator.cluster import session
from orchestrator.cluster.group import Size
from orchestrator.cluster.preflight import preflight
from orchestrator.config import ClusterConfig, RunConfig
from orchestrator.state.storage import Storage
from pipelines.dataset import Dataset
from pipelines.errors import ClusterError


def find_room(
    config: RunConfig, dataset: Dataset, storage: Storage, say: Callable[[str], None], stopped: Callable[[], bool]
) -> Size:
    """Looks at the nodes that are alive, waits for busy ones, asks each what it can reach.

    A worker that waits for streamed data must not trip the others' timeout, so theirs is longer by data.wait_seconds.

    Raises ClusterError where the cluster is too small, stays busy, or cannot reach data and storage;
    KeyboardInterrupt where `stopped` says so while it waits.
    """
    cluster = config.cluster
    found, cpus = session.nodes(), cluster.cpus_per_worker
    workers, gpus = find_workers(cluster)
    _wait(workers * cpus, workers * gpus, cluster.wait_seconds, say, stopped)
    interface = preflight([node for node in found if node.fits(cpus, gpus)], config, dataset, storage)
    timeout_s = cluster.timeout_seconds + (config.data.wait_seconds if dataset.streamed else 0)
    return Size(workers, cpus, gpus, timeout_s, interface)


def find_workers(cluster: ClusterConfig) -> tuple[int, int]:
    """(workers that fit, GPUs of each). Raises ClusterError where the cluster is too small."""
    found = session.nodes()
    gpus = int(cluster.device == "gpu" or (cluster.device == "auto" and any(node.gpus for node in found)))
    return session.choose_workers(cluster.span, found, cluster.cpus_per_worker, gpus), gpus


def _wait(cpus: int, gpus: int, seconds: int, say: Callable[[str], None], stopped: Callable[[], bool]) -> None:
    """Others may use the cluster: said at once, and waited for no longer than cluster.wait_seconds."""
    limit, told, need = time.monotonic() + seconds, False, _shown(cpus, gpus)
    while (free := session.free()).get("CPU", 0) < cpus or free.get("GPU", 0) < gpus:
        has = _shown(free.get("CPU", 0), free.get("GPU", 0) if gpus else 0)
        if time.monotonic() > limit:
            raise ClusterError(
                f"the run needs {need}; {has} are free and the rest is in use, after cluster.wait_seconds = {seconds}; "
                f"try again later or ask for fewer workers"
            )
        if not told:
            say(f"waiting for {need}: {has} are free")
            told = True
        if stopped():
            raise KeyboardInterrupt
        time.sleep(1.0)


def _shown(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
