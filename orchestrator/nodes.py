"""Samples of many nodes -> few curves: least, mean and greatest of each value, and which node is worst.

64 nodes with ten values each would be millions of rows in a long run; what each node did belongs to Ray's metrics.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean

Values = Mapping[str, float]
# The end of a value that holds a run up. The others (bytes, watts) have no bad end.
WORST_IS_GREATEST = {"cpu_percent": True, "memory_percent": True, "gpu_utilization_percent": False,
                     "gpu_memory_gib": True, "gpu_temperature_c": True}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """One value over the nodes that have it; of equal nodes the first by name counts."""

    least: float
    mean: float
    greatest: float
    lowest: str  # name of the node that has the least
    highest: str


def spreads(samples: Mapping[str, Values]) -> dict[str, Spread]:
    """{node: {name: value}} -> {name: Spread}, by name.

    >>> spreads({"b": {"cpu_percent": 90.0}, "a": {"cpu_percent": 70.0}})["cpu_percent"]
    Spread(least=70.0, mean=80.0, greatest=90.0, lowest='a', highest='b')
    """
    found = {}
    for name in sorted({name for values in samples.values() for name in values}):
        nodes = {node: samples[node][name] for node in sorted(samples) if name in samples[node]}
        low, high = min(nodes, key=nodes.__getitem__), max(nodes, key=nodes.__getitem__)
        found[name] = Spread(nodes[low], mean(nodes.values()), nodes[high], low, high)
    return found


def curves(samples: Mapping[str, Values]) -> dict[str, float]:
    """Metrics of one moment: `system/NAME` and `gpu/NAME` are the mean over the nodes, so a run that grows keeps its
    curves; with several nodes `NAME_least` and `NAME_greatest` stand beside it.

    >>> curves({"a": {"cpu_percent": 70.0, "gpu_power_w": 300.0}})
    {'system/cpu_percent': 70.0, 'gpu/power_w': 300.0}
    """
    points = {}
    for name, spread in spreads(samples).items():
        key = f"gpu/{name.removeprefix('gpu_')}" if name.startswith("gpu_") else f"system/{name}"
        points[key] = spread.mean
        if len(samples) > 1:
            points |= {f"{key}_least": spread.least, f"{key}_greatest": spread.greatest}
    return points


def worst(samples: Mapping[str, Values]) -> str:
    """Which of several nodes is worst, for people: 'cpu_percent node-3 97.1; memory_percent node-1 81.0'. A single node
    is compared with nothing, and nodes that are alike have no worst: ''."""
    found = spreads(samples)
    words = []
    for name, greatest in WORST_IS_GREATEST.items():
        if (spread := found.get(name)) and spread.least < spread.greatest:
            node, value = (spread.highest, spread.greatest) if greatest else (spread.lowest, spread.least)
            words.append(f"{name} {node} {value:.1f}")
    return "; ".join(words)


class Newest:
    """The newest sample of each node. One that came more than `keep_s` seconds ago is of a node that left."""

    def __init__(self, keep_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_s, self._clock = keep_s, clock
        self._came, self._values = dict[str, float](), dict[str, Values]()
        self._told = True

    def add(self, node: str, values: Values) -> None:
        """A node's sample, as it comes: the clocks of nodes differ."""
        self._came[node], self._values[node], self._told = self._clock(), values, False

    def now(self) -> dict[str, Values]:
        """{node: values}."""
        return {node: self._values[node] for node, at in self._came.items() if self._clock() - at <= self._keep_s}

    def news(self) -> dict[str, Values]:
        """The same where a sample came since the last call, else nothing: a fast run has more points than samples."""
        told, self._told = self._told, True
        return {} if told else self.now()
