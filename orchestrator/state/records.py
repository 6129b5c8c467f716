"""What a run writes about itself: `run.json` at its start, `result.json` at its end."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from orchestrator.config import RunConfig, flatten, identity_difference, unflatten
from orchestrator.state.storage import Storage
from pipelines.errors import ConfigError, DataError


@dataclass(frozen=True)
class RunRecord:
    """run.json: which run this is."""

    settings: dict[str, Any]  # flat, resolved
    dataset_digest: str
    mlflow_run_id: str | None = None
    id: str = ""  # names the run's copies in the nodes' memory; of this folder alone, so another run's never match


@dataclass(frozen=True)
class Result:
    """result.json: how a run ended. Accuracies are fractions, losses in nats."""

    name: str
    status: str  # finished | stopped | failed
    epochs: int  # finished
    steps: int
    top1: float | None = None
    top5: float | None = None
    val_samples: int | None = None
    loss: float | None = None  # validation
    train_loss: float | None = None  # mean over the last epoch's steps
    train_loss_mean: float | None = None  # mean over all steps
    weights_sha256: str | None = None
    data_digest: str | None = None  # training, 16 hex digits
    eval_digest: str | None = None  # the last evaluation's
    dataset_digest: str = ""
    world_size: int = 0
    restarts: int = 0  # of this submission, after a death
    resizes: int = 0  # of this submission: groups of another size than the one before
    steps_repeated: int = 0  # of this submission
    bad_samples: int = 0  # how often a bad training image was replaced
    images_per_second: float | None = None
    seconds: float = 0.0  # of training and evaluation, over all attempts
    parameters: int = 0
    multiply_adds: int = 0
    reason: str | None = None  # why it stopped or failed
    resumable: bool = False  # not finished, and the same name goes on from `checkpoint`
    checkpoint: str | None = None  # the newest, below the run's folder
    best_checkpoint: str | None = None  # of those kept, by validation top-1
    mlflow_run_id: str | None = None
    mlflow_url: str | None = None
    tracking: dict[str, int] = field(default_factory=dict)  # records of its journal: all, shipped, refused; or empty
    fetched: dict[str, int] = field(default_factory=dict)  # over the network by this submission: transfer.Fetched
    bad_images: list[dict[str, Any]] = field(default_factory=list)  # see register.BadImage
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, summary: Mapping[str, Any], **known: Any) -> "Result":
        """From a worker's summary, or from what is known of a run that did not end by itself."""
        curve = summary.get("curve") or []
        scored: dict[str, Any] = next((r for r in reversed(curve) if "val_top1" in r), {})
        own = {f.name for f in fields(cls)} & set(summary)
        return cls(
            top1=scored.get("val_top1"),
            top5=scored.get("val_top5"),
            val_samples=scored.get("val_samples"),
            loss=scored.get("val_loss"),
            eval_digest=scored.get("eval_digest"),
            train_loss=curve[-1]["train_loss"] if curve else None,
            **{name: summary[name] for name in own},
            **known,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of result.json."""
        return asdict(self)


def write_record(storage: Storage, record: RunRecord) -> None:
    """run.json."""
    storage.write("run.json", json.dumps(asdict(record), indent=1, default=list).encode())


def read_record(storage: Storage) -> RunRecord | None:
    """run.json; None for a new run."""
    data = storage.read("run.json")
    try:
        return None if data is None else RunRecord(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{storage.place}/run.json is damaged, so what the run was cannot be known; remove the run's folder, or "
            f"use another --name"
        ) from error


def write_result(storage: Storage, result: Result) -> None:
    """result.json, the last thing a run writes."""
    storage.write("result.json", json.dumps(result.to_dict(), indent=1).encode())


def read_result(storage: Storage) -> Result | None:
    """result.json; None where there is none, or a torn one: going on writes it again."""
    data = storage.read("result.json")
    try:
        return None if data is None else Result(**json.loads(data))
    except (ValueError, TypeError):
        return None


def admit(storage: Storage, config: RunConfig, dataset_digest: str) -> RunRecord | None:
    """The record of the run that `config` goes on with; None for a new one.

    Raises ConfigError where the name belongs to a run with another identity, and says what differs.
    """
    for name, kind in (("study.json", "study"), ("sweep.json", "sweep")):
        if storage.read(name) is not None:
            raise ConfigError(f"name '{config.name}' is a {kind} in {storage.place}; use another --name")
    record = read_record(storage)
    if record is None:
        return None
    differences = identity_difference(record.settings, config)
    if record.dataset_digest != dataset_digest:
        differences.append(f"the dataset's digest was {record.dataset_digest[:12]}, is {dataset_digest[:12]}")
    if differences:
        raise ConfigError(f"name '{config.name}' belongs to another run in {storage.place}: {'; '.join(differences)}; "
                          f"use those settings again, or another --name")  # fmt: skip
    return record


def existing(storage: Storage, name: str) -> RunRecord:
    """run.json of a run that exists. Raises DataError where there is none."""
    record = read_record(storage)
    if record is None:
        raise DataError(f"run '{name}' is not in {storage.place}: it has no run.json")
    return record


def settings_of(storage: Storage, name: str) -> RunConfig:
    """The settings of a run that exists. Raises DataError where there is none."""
    return RunConfig.model_validate(unflatten(existing(storage, name).settings))


def record_of(config: RunConfig, dataset_digest: str, mlflow_run_id: str | None, id: str = "") -> RunRecord:
    """The record of a run about to start."""
    return RunRecord(flatten(config), dataset_digest, mlflow_run_id, id)
