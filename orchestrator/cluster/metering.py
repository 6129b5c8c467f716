"""The door to Ray's metrics: what is counted and set here, each node's agent shows on its metrics port.

A call takes two microseconds: Ray adds up in this process and sends the sums to the node's agent every 10 s, and once
more when the process ends. What a killed process counted since then is not shown.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

from orchestrator.meters import RUN, WORKER, by_name

_METERS = by_name((*WORKER, *RUN))
NONE = 1e-300  # Ray refuses 0; this is lost in any sum, and a counter that is there before it rises has a rate


def count(labels: Mapping[str, str], amounts: Mapping[str, float]) -> None:
    """Adds to counters, by name; one that is named is there from then on."""
    with _apart():
        tags = dict(labels)
        for name, amount in amounts.items():
            _made(name).inc(amount or NONE, tags)


def show(labels: Mapping[str, str], values: Mapping[str, float]) -> None:
    """Sets gauges, by name. Each is gone from the node's page 20 s after it was set last."""
    with _apart():
        tags = dict(labels)
        for name, value in values.items():
            _made(name).set(value, tags)


@contextmanager
def _apart() -> Iterator[None]:
    """Metrics never end a training: what goes wrong with them is told, each thing once."""
    try:
        yield
    except Exception as error:
        _tell(f"{type(error).__name__}: {error}")


@cache
def _tell(text: str) -> None:
    print(f"warning: Ray's metrics do not show all of this run ({text})", file=sys.stderr, flush=True)


@cache
def _made(name: str) -> Any:
    """Once a process: whichever run it works on is a label's matter."""
    meter = _METERS[name]
    return (Counter if meter.counts else Gauge)(meter.full_name, meter.meaning, meter.labels)
