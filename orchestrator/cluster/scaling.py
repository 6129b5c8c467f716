"""Nodes that an autoscaler adds: asked for when a run starts, and waited for.

The request is a placement group: Ray's autoscaler counts those that have no place yet, of all drivers together, and
forgets one when its driver ends. (`request_resources` is one number for the whole cluster: the last caller's.)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from orchestrator.cluster import session
from orchestrator.config import ClusterConfig

LOOK_S = 0.5
Say = Callable[[str], None]


def await_nodes(cluster: ClusterConfig, workers: int, say: Say, stopped: Callable[[], bool] = bool) -> None:
    """Until so many workers fit, on nodes that are there or come; after cluster.start_seconds with what there is.

    Raises KeyboardInterrupt where that was asked meanwhile.
    """
    if not cluster.start_seconds:
        return
    with _asked(workers, cluster.cpus_per_worker, session.gpus_of(cluster)) as placed:
        began, told = time.monotonic(), -1
        while not placed() and time.monotonic() - began < cluster.start_seconds:
            if (nodes := len(session.nodes())) != told:
                say(f"waiting for nodes with room for {workers} workers, at most {cluster.start_seconds} s "
                    f"(cluster.start_seconds): the cluster has {nodes} now")  # fmt: skip
                told = nodes
            if stopped():
                raise KeyboardInterrupt
            time.sleep(LOOK_S)


@contextmanager
def _asked(workers: int, cpus: int, gpus: int) -> Iterator[Callable[[], bool]]:
    """Places for so many are asked for meanwhile; whether they are there. Given back at the end: a group takes its
    own, on nodes that an autoscaler keeps for minutes."""
    bundle = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    wanted: PlacementGroup = placement_group([bundle] * workers)
    try:
        yield lambda: placement_group_table(wanted)["state"] == "CREATED"
    finally:
        remove_placement_group(wanted)
