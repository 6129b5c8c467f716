"""Room for a group: how many workers, on which nodes, as the cluster is now. Never a silent wait."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.cluster import session
from orchestrator.cluster.crews import Crews, Resources
from orchestrator.cluster.group import Size
from orchestrator.cluster.preflight import preflight
from orchestrator.cluster.session import Node
from orchestrator.config import ClusterConfig, RunConfig
from orchestrator.state.storage import Storage
from pipelines.dataset import Dataset
from pipelines.errors import ClusterError, SkiplaneError

LOOK_S = 0.3
REFUSED_S = 60.0  # until a node that could not take part is asked again: what was wrong may have passed
SETTLE_S = 5.0  # that fewer workers than fit wait for busy CPUs: those of a group that just ended are free by then
Say = Callable[[str], None]


class Room:
    """The nodes that a run's workers may be on. Each is asked once what it can reach, so a restart asks nobody.

    crews: of this driver; what an idle group holds is free. stopped: whether whoever waits here should not wait any
    longer.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        storage: Storage,
        crews: Crews,
        say: Say,
        stopped: Callable[[], bool] = bool,
    ) -> None:
        self._config, self._dataset, self._storage = config, dataset, storage
        self._crews, self._say, self._stopped = crews, say, stopped
        self._interfaces: dict[str, str | None] = {}  # node id -> network interface, of the nodes that were asked
        self._refused: dict[str, tuple[float, str]] = {}  # node id -> when it could not take part, and why
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
                size = self._size(workers, usable)
                if self._crews.admits(size):
                    return size
                began, waited = time.monotonic(), 0.0
            told = self._wait(waited, usable, told)

    def usable(self) -> list[Node]:
        """Nodes with room that live, answer, were not told to go, and were not refused."""
        leaving = session.draining()
        return session.reachable([node for node in session.nodes() if self.holds(node) and node.id not in leaving])

    def holds(self, node: Node) -> int:
        """Workers that a node has room for, were it idle."""
        return node.fits(self._config.cluster.cpus_per_worker, self._gpus)

    def fits(self, found: Sequence[Node]) -> int:
        """The same of all; no more than cluster.workers allows."""
        return min(sum(self.holds(node) for node in self._good(found)), self._config.cluster.span[1])

    def free(self, found: Sequence[Node]) -> int:
        """How many workers would go on CPUs and GPUs of these that nobody uses now."""
        now = self._free()
        left = [
            replace(node, cpus=now[node.id].get("CPU", 0.0), gpus=now[node.id].get("GPU", 0.0))
            for node in self._good(found)
            if node.id in now
        ]
        return sum(self.holds(node) for node in left)

    def _free(self) -> Resources:
        """Node id -> what nobody uses there, but for this driver's idle group."""
        now, idle = session.free(), self._crews.idle()
        return {node: dict(Counter(free) + Counter(idle.get(node, {}))) for node, free in now.items()}

    def admit(self, found: Sequence[Node], strict: bool = False) -> None:
        """Asks nodes that were not asked yet. One that cannot take part is an error (strict), or refused and said."""
        new = [n for n in self._good(found) if n.id not in self._interfaces]
        try:
            self._ask(new, strict)
        except SkiplaneError as error:
            if strict:
                raise
            if len(new) > 1:  # one by one: which is it?
                for node in new:
                    self.admit([node])
            else:
                self._refuse(new[0], str(error))

    def _good(self, found: Sequence[Node]) -> list[Node]:
        """Without those that were refused a moment ago."""
        since = time.monotonic() - REFUSED_S
        return [node for node in found if self._refused.get(node.id, (-math.inf, ""))[0] < since]

    def _refuse(self, node: Node, why: str) -> None:
        if self._refused.get(node.id, (0.0, ""))[1] != why:
            self._say(f"node {node.address} gets no workers: {why}")
        self._refused[node.id] = (time.monotonic(), why)

    def _ask(self, new: Sequence[Node], first: bool) -> None:
        if new:
            answers = preflight(list(new), self._config, self._dataset, self._storage, space=first)
            reports = {report.address: report for report in answers}
            self._interfaces |= {node.id: reports[node.address].interface for node in new}

    def _workers(self, usable: Sequence[Node], waited: float) -> int:
        """As many as fit and are free; after SETTLE_S fewer will do. 0: not yet."""
        least, fits, free = self._config.cluster.span[0], self.fits(usable), self.free(usable)
        if fits >= least and free >= fits:
            return fits
        return min(fits, free) if waited > SETTLE_S and min(fits, free) >= least else 0

    def _size(self, workers: int, usable: Sequence[Node]) -> Size:
        """A worker that waits for streamed data must not trip the others' timeout: theirs is longer by that."""
        cluster, data = self._config.cluster, self._config.data
        nodes = tuple(node.id for node in self._good(usable) if node.id in self._interfaces)
        names = {self._interfaces[node] for node in nodes}
        timeout_s = cluster.timeout_seconds + (data.wait_seconds if self._dataset.streamed else 0)
        interface = names.pop() if len(names) == 1 else None
        deterministic = self._config.train.deterministic or not self._gpus
        return Size(workers, cluster.cpus_per_worker, self._gpus, timeout_s, interface, nodes, deterministic)

    def _wait(self, waited: float, usable: Sequence[Node], told: str) -> str:
        """Says once what is waited for. Raises ClusterError after cluster.wait_seconds."""
        lacks, has = self._lack(usable)
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

    def _lack(self, usable: Sequence[Node]) -> tuple[str, str]:
        """What is waited for, and what there is of it."""
        cluster, fits = self._config.cluster, self.fits(usable)
        if fits < cluster.span[0]:
            return f"nodes for {cluster.span[0]} workers", f"those that are left have room for {fits}"
        now = [free for id, free in self._free().items() if id in {node.id for node in usable}]
        cpus, gpus = (sum(free.get(what, 0.0) for free in now) for what in ("CPU", "GPU"))
        has = _shown(cpus, gpus if self._gpus else 0)
        return _shown(fits * cluster.cpus_per_worker, fits * self._gpus), f"{has} are free and the rest is in use"


def find_workers(cluster: ClusterConfig) -> tuple[int, int]:
    """(workers that fit, GPUs of each). Raises ClusterError where the cluster is too small."""
    gpus = session.gpus_of(cluster)
    return session.choose_workers(cluster.span, session.nodes(), cluster.cpus_per_worker, gpus), gpus


def _shown(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
