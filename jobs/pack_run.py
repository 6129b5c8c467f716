"""Who does the tasks of `python -m jobs.pack`: this process, several, or a Ray cluster."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs import edge
from orchestrator.cluster.environment import prepare
from orchestrator.settings import Edge
from pipelines.errors import ConfigError
from pipelines.packing.processes import Processes
from pipelines.packing.run import Here, Run
from pipelines.remote.url import is_url


@contextmanager
def chosen(
    args: argparse.Namespace, few: bool, most: int, paths: Sequence[Path] = (), out: Path | None = None
) -> Iterator[Run]:
    """Who does the tasks: this process where there is little to do, else Ray where RAY_ADDRESS names one, or processes.

    most: tasks that there are. paths, out: what Ray's nodes have to see.
    """
    cores = len(os.sched_getaffinity(0))
    if args.workers == 1 or (not args.workers and (few or cores == 1)):
        yield Here(cores)
    elif not os.environ.get("RAY_ADDRESS"):
        count = min(args.workers or cores, most)
        edge.say(f"{args.doing} with {_many(count, 'process')}")
        yield Processes(count)
    else:
        prepare(Edge.of_environment().home)
        from orchestrator.cluster import session, tasks  # ray takes seconds to import

        with session.session(0, edge.say):
            edge.say(f"{args.doing} with Ray tasks on {_many(len(session.nodes()), 'node')}")
            yield tasks.RayTasks(args.workers or tasks.cpus(), paths, out)


def check_absolute(out: str) -> None:
    """Raises ConfigError for an --out that means another folder on each node."""
    if os.environ.get("RAY_ADDRESS") and not is_url(out) and not Path(out).expanduser().is_absolute():
        raise ConfigError(f"--out is {out}; on a cluster an absolute folder that every node sees is needed, or a URL")


def _many(count: int, what: str) -> str:
    """'1 node', '2 processes'"""
    return f"{count} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"
