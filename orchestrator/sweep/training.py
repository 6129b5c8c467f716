"""What a slot does with a trial: trains its run, from wherever it is, and says how it ended."""

import json
from collections.abc import Callable
from typing import Any

from orchestrator import supervise
from orchestrator.cluster.crews import Crews
from orchestrator.config import RunConfig
from orchestrator.context import Record
from orchestrator.state.records import Result
from orchestrator.stop import Stop
from pipelines.errors import ClusterError, SkiplaneError


def task(config: RunConfig, title: str, tags: dict[str, str]) -> str:
    """All that `train` has to know, as text."""
    return json.dumps({"config": config.model_dump(), "title": title, "tags": tags}, default=list)


def train(what: str, tell: Callable[[Record], None], stop: Stop, crews: Crews) -> dict[str, Any]:
    """`task`'s text -> how the trial ended: see `ended`, and

    lacking: it could not start or go on for want of the cluster; another try may help
    stopped: it was asked to stop before it began
    failed: for `reason`
    """
    said = json.loads(what)

    def say(text: str) -> None:
        tell({"kind": "said", "text": text})

    def show(record: Record) -> None:
        if record["kind"] in ("epoch", "recalled"):
            tell(record)

    try:
        result = supervise.run(
            RunConfig.model_validate(said["config"]), child=True, sends=False, title=said["title"], tags=said["tags"],
            say=say, stop=stop, show=show, crews=crews,
        )  # fmt: skip
    except supervise.Stopped:
        return {"state": "stopped", "reason": stop.why}
    except ClusterError as error:
        return {"state": "lacking", "reason": str(error)}
    except SkiplaneError as error:
        return {"state": "failed", "reason": str(error)}
    return ended(result)


def ended(result: Result) -> dict[str, Any]:
    """How a run ended that did."""
    return {
        "state": result.status,
        "reason": result.reason,
        "curve": result.curve,
        "seconds": result.seconds,
        "weights_sha256": result.weights_sha256,
        "mlflow_run_id": result.mlflow_run_id,
    }
