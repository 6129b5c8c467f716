"""Room for a group: how many workers, on which nodes, as the cluster is now. Never a silent wait."""

import time
from collections.abc import Callable, Sequence

from orchestrator.cluster import session
from orchestrator.cluster.group import Size
from orchestrator.cluster.preflight import preflight
from orchestrator.cluster.session import Node
from orchestrator.config import ClusterConfig, RunConfig
from orchestrator.state.storage import Storage
from pipelines.dataset import Dataset
from pipelines.errors import ClusterError, SkiplaneError

LOOK_S = 0.3
SETTLE_S = 5.0  # that fewer workers than fit wait for busy CPUs: those of a group that just ended are free by then
Say = Callable[[str], None]


class Room:
    """The nodes that a run's workers may be on. Each is asked once what it can reach, so a restart asks nobody.

    stopped: whether whoever waits here should not wait any longer.
    """

    def __init__(
        self, config: RunConfig, dataset: Dataset, storage: Storage, say: Say, stopped: Callable[[], bool] = bool
    ) -> None:
        self._config, self._dataset, self._storage = config, dataset, storage
        self._say, self._stopped = say, stopped
        self._interfaces: dict[str, str | None] = {}  # node id -> network interface, of the nodes that were asked
        self._refused: set[str] = set()  # ids of those that cannot take part
        self._gpus = 0  # of a worker

    def find(self, again: bool = False) -> Size:
        """How large a group is now, and where it goes. again: a group was there before, and what it had may be gone:
        then nodes are waited for, and a new one that cannot take part is passed over.

        Raises ClusterError where the cluster is too small, stays busy, or cannot reach data and storage;
        KeyboardInterrupt where it was asked to stop while it waits.
        """
        if not again:
            _, self._gpus = find_workers(self._config.cluster)
        began, told = time.monotonic(), ""
        while True:
            usable = self.usable()
            self.admit(usable, strict=not again)
            waited = time.monotonic() - began
            if workers := self._workers(usable, waited):
                return self._size(workers, usable)
            told = self._wait(waited, self.fits(usable), told)

    def usable(self) -> list[Node]:
        """Nodes with room that live, answer, were not told to go, and were not refused."""
        leaving = session.draining()
        found = [n for n in session.nodes() if self.holds(n) and n.id not in leaving and n.id not in self._refused]
        return session.reachable(found)

    def holds(self, node: Node) -> int:
        """Workers that a node has room for, were it idle."""
        return node.fits(self._config.cluster.cpus_per_worker, self._gpus)

    def fits(self, found: Sequence[Node]) -> int:
        """The same of all; no more than cluster.workers allows."""
        admitted = [node for node in found if node.id not in self._refused]
        return min(sum(self.holds(node) for node in admitted), self._config.cluster.span[1])

    def free(self) -> int:
        """How many workers would go on CPUs and GPUs that nobody uses now."""
        free = session.free()
        by_cpu = int(free.get("CPU", 0) // self._config.cluster.cpus_per_worker)
        return min(by_cpu, int(free.get("GPU", 0) // self._gpus)) if self._gpus else by_cpu

    def admit(self, found: Sequence[Node], strict: bool = False) -> None:
        """Asks nodes that were not asked yet. One that cannot take part is an error (strict), or refused and said."""
        new = [node for node in found if node.id not in self._interfaces and node.id not in self._refused]
        if strict:
            return self._ask(new)
        for node in new:
            try:
                self._ask([node])
            except SkiplaneError as error:
                self._refused.add(node.id)
                self._say(f"node {node.address} gets no workers: {error}")

    def _ask(self, new: Sequence[Node]) -> None:
        if new:
            reports = {r.address: r for r in preflight(list(new), self._config, self._dataset, self._storage)}
            self._interfaces |= {node.id: reports[node.address].interface for node in new}

    def _workers(self, usable: Sequence[Node], waited: float) -> int:
        """As many as fit and are free; after SETTLE_S fewer will do. 0: not yet."""
        least, fits, free = self._config.cluster.span[0], self.fits(usable), self.free()
        if fits >= least and free >= fits:
            return fits
        return min(fits, free) if waited > SETTLE_S and min(fits, free) >= least else 0

    def _size(self, workers: int, usable: Sequence[Node]) -> Size:
        """A worker that waits for streamed data must not trip the others' timeout: theirs is longer by that."""
        cluster, data = self._config.cluster, self._config.data
        nodes = tuple(node.id for node in usable if node.id not in self._refused)
        names = {self._interfaces[node] for node in nodes}
        timeout_s = cluster.timeout_seconds + (data.wait_seconds if self._dataset.streamed else 0)
        interface = names.pop() if len(names) == 1 else None
        return Size(workers, cluster.cpus_per_worker, self._gpus, timeout_s, interface, nodes)

    def _wait(self, waited: float, fits: int, told: str) -> str:
        """Says once what is waited for. Raises ClusterError after cluster.wait_seconds."""
        lacks, has = self._lack(fits)
        if waited > (limit := self._config.cluster.wait_seconds):
            raise ClusterError(
                f"the run needs {lacks}; {has}, after cluster.wait_seconds = {limit}; try again later or ask for fewer "
                f"workers"
            )
        if lacks != told:
            self._say(f"waiting for {lacks}: {has}")
        if self._stopped():
            raise KeyboardInterrupt
        time.sleep(LOOK_S)
        return lacks

    def _lack(self, fits: int) -> tuple[str, str]:
        """What is waited for, and what there is of it."""
        cluster = self._config.cluster
        if fits < cluster.span[0]:
            return f"nodes for {cluster.span[0]} workers", f"those that are left have room for {fits}"
        free = session.free()
        has = _shown(free.get("CPU", 0), free.get("GPU", 0) if self._gpus else 0)
        return _shown(fits * cluster.cpus_per_worker, fits * self._gpus), f"{has} are free and the rest is in use"


def find_workers(cluster: ClusterConfig) -> tuple[int, int]:
    """(workers that fit, GPUs of each). Raises ClusterError where the cluster is too small."""
    found = session.nodes()
    gpus = int(cluster.device == "gpu" or (cluster.device == "auto" and any(node.gpus for node in found)))
    return session.choose_workers(cluster.span, found, cluster.cpus_per_worker, gpus), gpus


def _shown(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
