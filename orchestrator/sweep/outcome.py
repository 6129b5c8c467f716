"""What a slot says of a trial -> what the trial becomes. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.sweep.trial import METRICS, Trial

KNOWN = ("seconds", "weights_sha256", "mlflow_run_id")
FIELDS = {"val/top1": "val_top1", "val/top5": "val_top5", "val/loss": "val_loss", "train/loss": "train_loss"}


def metrics(trial: Trial, record: Mapping[str, Any], metric: str) -> dict[str, float] | None:
    """An epoch's values; None where it has none of the sweep's metric, or is an epoch that counted before.

    What a trial that takes up another one recalls from before is the other one's.
    """
    since = max(trial.epoch, trial.fork.epoch if trial.fork else 0)
    if FIELDS[metric] not in record or record["epoch"] <= since:
        return None
    return {name: record[FIELDS[name]] for name in METRICS if FIELDS[name] in record}


def after(trial: Trial, outcome: Mapping[str, Any], ruled: str | None) -> Trial:
    """The trial once its slot has ended. ruled: why the rule ended it.

    Where it did not come so far as it was to (at a rung, or with the sweep) it waits.
    """
    known = {name: outcome[name] for name in KNOWN if outcome.get(name) is not None}
    trial, state = replace(trial, **known), outcome["state"]
    if state == "failed":
        return replace(trial, state="failed", reason=outcome["reason"])
    if ruled is not None:
        return replace(trial, state="stopped", reason=ruled)
    ended = state == "finished" or (state == "stopped" and trial.epoch >= (trial.stop_after or trial.epochs))
    return replace(trial, state="finished" if ended else "waiting", reason=None)
