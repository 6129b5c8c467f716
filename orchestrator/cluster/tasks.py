"""Independent tasks on a Ray cluster, a bounded number at a time: what packing does there."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.session import Node, nodes
from pipelines.errors import ClusterError
from pipelines.packing.run import R, T, Work

ANSWER_S = 60


@dataclass(frozen=True)
class RayTasks:
    """One CPU a task, at most `count` tasks at a time. Work, tasks and results are pickled; a session is open.

    source, out: what every node has to see; out is there by now, where it is a folder.
    """

    count: int
    source: Sequence[Path] = ()
    out: Path | None = None

    def __call__(self, work: Work[T, R], tasks: Iterable[T], tell: Callable[[T, int], None]) -> Iterator[tuple[T, R]]:
        """See Run; progress comes with the end of each task. Ray does a task again whose process died.

        Raises what the work raises, ClusterError where Ray gives up.
        """
        _check_seen(self.source, self.out)
        remote = ray.remote(num_cpus=1)(_counted)
        shared = ray.put(work)
        left, pending = iter(tasks), dict[Any, T]()
        try:
            while True:
                for task in left:
                    pending[remote.remote(shared, task)] = task
                    if len(pending) >= self.count:
                        break
                if not pending:
                    return
                (ready, *_), _ = ray.wait(list(pending), num_returns=1)
                task = pending.pop(ready)
                more, made = _got(ready, task)
                tell(task, more)
                yield task, made
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


def cpus() -> int:
    """Of all nodes."""
    return max(1, int(sum(node.cpus for node in nodes())))


def _check_seen(source: Sequence[Path], out: Path | None) -> None:
    """Raises ClusterError with a node that may get tasks and does not see what they read, or where they write."""
    found = [node for node in nodes() if node.cpus >= 1]
    for node, missing in zip(found, _ask(found, [str(path) for path in (*source, out) if path]), strict=True):
        if missing == str(out):
            raise ClusterError(
                f"--out {missing} is not there on node {node.address}; name a folder that every node sees, or a URL"
            )
        if missing:
            raise ClusterError(
                f"the source {missing} is not there on node {node.address}; put it where every node sees it"
            )


def _ask(found: Sequence[Node], wanted: Sequence[str]) -> list[str]:
    """The first path that each node does not see; empty where it sees all."""
    remote = ray.remote(num_cpus=0)(_missing)
    answers = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(wanted)
        for node in found
    ]
    try:
        return list(ray.get(answers, timeout=ANSWER_S))
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a node did not answer within {ANSWER_S} s: {type(error).__name__}; look at `ray status`, then try again"
        ) from error


def _missing(wanted: Sequence[str]) -> str:
    return next((path for path in wanted if not os.access(path, os.R_OK)), "")


def _counted(work: Work[Any, Any], task: Any) -> tuple[int, Any]:
    """(progress, result); runs on a node."""
    more = 0

    def tell(so_many: int) -> None:
        nonlocal more
        more += so_many

    made = work(task, tell, 1)
    return more, made


def _got(reference: Any, task: object) -> tuple[int, Any]:
    try:
        more, made = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"Ray gave up {task}: {type(error).__name__}; look at `ray status`, then give the same command again"
        ) from error
    return more, made
