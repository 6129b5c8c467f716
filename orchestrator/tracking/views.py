"""Links into MLflow's pages, and the saved view that shows curves side by side.

A view is an experiment's tag in a format internal to MLflow's pages (seen in 3.17.2; mlflow is pinned, and a test opens
one in a browser where there is one). `plain_url` is the way without it.
"""

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

CURVES = ("train/loss", "val/error", "train/top1", "perf/images_per_s")  # in this order, two in a row
SORT = "metrics.`val/error`"  # any metric: sorted by date, children hide under their parent
MODE = "compareRunsMode=CHART&workflowType=machine_learning"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of one run."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def view_url(uri: str, experiment_id: str, key: str) -> str:
    """Opens the view that `save` returned the key of."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&{MODE}"


def plain_url(uri: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The same runs in MLflow's own arrangement of charts; ten of them at most are drawn."""
    query = f"searchFilter={quote(_filter(run_ids))}&orderByKey={quote(SORT)}&orderByAsc=true"
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs?{MODE}&{query}"


def save(client: Any, experiment_id: str, name: str, run_ids: Sequence[str]) -> str:
    """Saves a view of these runs, listed under `name`; returns its key. About 400 runs fit into the tag's 20,000 bytes.

    The same name and runs give the same key: a study that is looked at again does not pile views up.
    """
    key = hashlib.sha256(f"{name} {' '.join(run_ids)}".encode()).hexdigest()[:32]
    now = time.time_ns() // 1_000_000
    packed = base64.b64encode(zlib.compress(json.dumps(state(run_ids)).encode())).decode()
    value = json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", value)
    return key


def state(run_ids: Sequence[str]) -> dict[str, Any]:
    """The content of a view, as MLflow's pages keep it."""
    return {
        "searchFilter": _filter(run_ids), "orderByKey": SORT, "orderByAsc": True, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": ["metrics.`train/loss`", SORT], "columnOrder": [], "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL", "viewMaximized": False, "runListHidden": False, "isAccordionReordered": True,
        "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "groupBy": None, "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [{"uuid": "curves", "name": "Skiplane", "display": True, "isReordered": False,
                                "deleted": False, "isGenerated": False, "columns": 2, "cardHeight": 300}],
        "compareRunCharts": [_chart(key, len(run_ids)) for key in CURVES],
    }  # fmt: skip


def _chart(metric: str, runs: int) -> dict[str, Any]:
    return {
        "uuid": metric.replace("/", "-"), "metricSectionId": "curves", "deleted": False, "isGenerated": False,
        "type": "LINE", "metricKey": metric, "displayName": metric, "selectedMetricKeys": [metric],
        "runsCountToCompare": max(runs, 20), "lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear",
        "range": {}, "xAxisKey": "step", "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [],
        "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


def _filter(run_ids: Sequence[str]) -> str:
    return f"attributes.run_id IN ({','.join(repr(run_id) for run_id in run_ids)})"
