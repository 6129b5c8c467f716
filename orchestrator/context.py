"""What a worker knows of the world: its rank, its device, whom to tell, and whether it was asked to stop.

LocalContext is the stand-in for Ray: it serves single-process runs, tests, and plain `torch.distributed` processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Record = dict[str, Any]


class Context(Protocol):
    """One worker's place in the group."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def node_ranks(self) -> range:
        """The ranks on this node, its own among them."""

    def send(self, records: list[Record]) -> None:
        """Tells the driver; never blocks."""

    def count(self, run: str, amounts: Mapping[str, float]) -> None:
        """Adds to this worker's counters of a run (meters.WORKER), by name; never blocks, costs microseconds."""

    def stop_asked(self, step: int) -> bool:
        """Whether the driver wants a checkpoint and an end; never blocks, costs microseconds.

        step: global steps done, of which the driver hears now and then.
        """


def _ignore(_: list[Record]) -> None: ...


@dataclass
class LocalContext:
    """A worker without a cluster; `hear` gets what is sent, `stop` is asked at every step, counts are kept."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hear: Callable[[list[Record]], None] = _ignore
    stop: Callable[[], bool] = bool
    counted: dict[str, float] = field(default_factory=dict)

    @property
    def node_ranks(self) -> range:
        """One node has them all."""
        return range(self.world_size)

    def send(self, records: list[Record]) -> None:
        """Hands the records over at once."""
        self.hear(records)

    def count(self, run: str, amounts: Mapping[str, float]) -> None:
        """Adds to `counted`."""
        for name, amount in amounts.items():
            self.counted[name] = self.counted.get(name, 0) + amount

    def stop_asked(self, step: int) -> bool:
        """Asks `stop`."""
        return self.stop()
