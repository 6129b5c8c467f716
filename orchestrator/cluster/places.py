"""Which trials' groups of workers are on the cluster: a trial starts only when the whole of its group fits."""

from orchestrator.cluster import session
from orchestrator.config import ClusterConfig
from pipelines.errors import ClusterError


class Places:
    """Places for workers of one size, and who has them. The cluster is looked at anew each time: nodes come and go."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cpus = cluster.cpus_per_worker
        self._gpus = session.gpus_of(cluster)
        self._taken: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Of the cluster, were it idle."""
        return sum(node.fits(self._cpus, self._gpus) for node in session.nodes())

    def check(self, workers: str, whose: str) -> None:
        """Raises ClusterError where such a group never fits."""
        least, _ = ClusterConfig(workers=workers).span
        if least > (total := self.total):
            each = f"{self._cpus} CPU" + (" and 1 GPU" if self._gpus else "")
            raise ClusterError(
                f"{whose} asks for {least} workers of {each} each, and the cluster has room for {total}: the sweep "
                f"could never place it; ask for fewer (--sweep.workers) or add nodes"
            )

    def take(self, id: str, workers: str) -> str | None:
        """Places for a trial with these cluster.workers: what it may have now, such as '2' or '1..3'; None: not yet."""
        least, most = ClusterConfig(workers=workers).span
        free = self.total - sum(self._taken.values())
        if free < least:
            return None
        self._taken[id] = most = min(most, free)
        return str(most) if least == most else f"{least}..{most}"

    def give(self, id: str) -> None:
        """Back, when the trial has ended."""
        self._taken.pop(id, None)
