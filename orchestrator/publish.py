"""A run's checkpoint put among the models of MLflow, when a person asks for it."""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.export import export
from orchestrator.state.records import read_record
from orchestrator.state.storage import Storage
from orchestrator.tracking.address import without_password
from orchestrator.tracking.failures import Refused, Unreachable
from orchestrator.tracking.journal import read_ack
from orchestrator.tracking.models import how_to_use, log_model
from pipelines.errors import ClusterError, ConfigError, DataError


@dataclass(frozen=True)
class Published:
    """A model of MLflow, and how others use it."""

    uri: str  # models:/m-...
    what: str  # one sentence
    load: str  # a line of Python
    serve: str  # a line for the shell


def publish(
    place: str,
    uri: str,
    *,
    checkpoint: str = "",
    register: str = "",
    alias: str = "",
    warn: Callable[[str], None] = print,
) -> Published:
    """Logs a checkpoint of the run in the folder or at the URL `place`, the best (else the newest) unless one is named.

    uri: of MLflow. register, alias: see `log_model`; what is there already is not made again. warn: see `export`.
    Raises DataError for a run or checkpoint that is not there, ConfigError for what MLflow refuses, ClusterError where
    it does not answer.
    """
    exported, shown = export(place, checkpoint, warn), without_password(uri)
    run_id = _run_id(place)
    try:
        model = log_model(uri, run_id, exported, register=register, alias=alias)
    except Unreachable as error:
        raise ClusterError(f"MLflow at {shown}: {error}; start it, or say where it is now") from error
    except Refused as error:
        raise ConfigError(f"MLflow at {shown} refuses this: {error}") from error
    name = f"models:/{register}@{alias}" if alias else model
    top1 = "not evaluated" if exported.top1 is None else f"top-1 {exported.top1:.2%}"
    nameless = f"; its classes have no names: {exported.unnamed}" if exported.unnamed else ""
    what = f"{name} is {exported.net} of '{exported.run}' at {exported.checkpoint}, {top1}{nameless}"
    return Published(model, what, *how_to_use(uri, name))


def _run_id(place: str) -> str:
    """The run in MLflow that the journal went to; of older runs, what run.json says."""
    storage = Storage(place)
    ack, record = read_ack(storage), read_record(storage)
    found = ack.run_id if ack else record.mlflow_run_id if record else None
    if not found:
        raise DataError(f"the run in {place} has not been made in MLflow yet; send what was tracked first: "
                        f"python -m jobs.tracking sync {place}")  # fmt: skip
    return found
