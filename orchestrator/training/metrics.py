"""Sums behind a metric: kept as sums, so that they can be saved in mid-epoch and divided once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass
class EpochSums:
    """What an epoch has seen so far; `to_dict` and `from_dict` carry it through a checkpoint exactly."""

    steps: int = 0
    loss: float = 0.0  # sum over steps of the global batch's mean loss
    top1: int = 0
    top5: int = 0
    samples: int = 0

    def add(self, *, loss: float, top1: float, top5: float, samples: float, **_: float) -> None:
        """One step; the names are those of `step.to_host`, others are passed over."""
        self.steps += 1
        self.loss += loss
        self.top1 += int(top1)
        self.top5 += int(top5)
        self.samples += int(samples)

    @property
    def mean_loss(self) -> float:
        """Mean over the steps; nan before the first."""
        return self.loss / self.steps if self.steps else float("nan")

    @property
    def top1_share(self) -> float:
        """Share of samples, 0..1; nan before the first."""
        return self.top1 / self.samples if self.samples else float("nan")

    @property
    def top5_share(self) -> float:
        return self.top5 / self.samples if self.samples else float("nan")

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, sums: Mapping[str, float]) -> "EpochSums":
        """Back from `to_dict`; TypeError for other names."""
        counts = {name: int(value) for name, value in sums.items() if name != "loss"}
        return cls(loss=float(sums["loss"]), **counts)
