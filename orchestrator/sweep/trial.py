"""A trial: one run of a sweep, what it was asked to be, and what was heard of it.

All that a sweep decides follows from its trials and the order of their reports; nothing else is kept.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

State = Literal["waiting", "running", "finished", "stopped", "failed"]
OVER = ("finished", "stopped", "failed")
# What a trial reports after each evaluation -> whether more of it is better. Accuracies are fractions, losses in nats.
METRICS = {"val/top1": True, "val/top5": True, "val/loss": False, "train/loss": False}


def signed(metric: str, value: float) -> float:
    """A value of the metric such that more is better."""
    return value if METRICS[metric] else -value


@dataclass(frozen=True)
class Report:
    """An evaluation of a trial."""

    order: int  # among the reports of all trials: in which order the sweep's driver heard them
    epoch: int  # epochs done
    samples: int  # training images seen since the beginning of the run
    metrics: dict[str, float]  # see METRICS
    seconds: float = 0.0  # that the trial has had its workers for, or waited for them to start


@dataclass(frozen=True)
class Fork:
    """Where a trial begins that takes another one up: its state after so many epochs."""

    trial: str
    epoch: int


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, in `<storage>/<sweep>/<id>/`."""

    id: str  # t001: also the run's name
    config: dict[str, Any]  # dotted name -> value, of the settings that the sweep varies
    title: str  # what differs, for people: resnet-34 lr=0.1
    net: str = ""  # resnet-34
    epochs: int = 0  # asked for
    workers: str = "1"  # cluster.workers
    parameters: int = 0
    multiply_adds: int = 0  # of one image forward
    state: State = "waiting"
    reason: str | None = None  # why it stopped or failed
    reports: tuple[Report, ...] = ()
    seconds: float = 0.0  # of training and evaluation, over all its attempts
    weights_sha256: str | None = None
    mlflow_run_id: str | None = None
    fork: Fork | None = None
    stop_after: int = 0  # epochs after which it ends by plan; 0 = at the schedule's end
    failures: int = 0  # times in a row, without a report, that its driver died

    @property
    def over(self) -> bool:
        """Whether it will not train any more in this sweep."""
        return self.state in OVER

    @property
    def epoch(self) -> int:
        """Epochs that were reported."""
        return self.reports[-1].epoch if self.reports else 0

    def value(self, metric: str) -> float | None:
        """The newest value of a metric; None before the first report."""
        return self.reports[-1].metrics.get(metric) if self.reports else None

    def score(self, metric: str) -> float | None:
        """The same, such that more is better."""
        value = self.value(metric)
        return None if value is None else signed(metric, value)

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def of(cls, said: dict[str, Any]) -> Self:
        """From the journal. Raises TypeError or KeyError for what is no trial."""
        reports = tuple(Report(**report) for report in said["reports"])
        return cls(**{**said, "reports": reports, "fork": Fork(**said["fork"]) if said["fork"] else None})
