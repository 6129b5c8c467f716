"""Links into MLflow's pages, and the saved views that show runs side by side.

A view is an experiment's tag in a format internal to MLflow's pages (seen in 3.17.2; mlflow is pinned, and tests open
views in a browser where there is one).
"""

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

TRAINING = "workflowType=machine_learning"  # else the pages show a run as an evaluation of language models
MODE = f"compareRunsMode=CHART&{TRAINING}"
DRAWN = 20  # runs in a chart, at least; a view of more has them all


@dataclass(frozen=True)
class Chart:
    """LINE: a curve over steps for each run. BAR: each run's last value. PARALLEL: `params` beside the last value."""

    metric: str
    kind: Literal["LINE", "BAR", "PARALLEL"] = "LINE"
    params: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """Runs side by side: which, in which order, with which charts (two in a row) and columns."""

    name: str  # listed under it
    where: str  # which runs, as MLflow searches them
    runs: int  # about how many these are
    sort: str  # a metric: sorted by date, children hide under their parent
    ascending: bool  # the best come first
    charts: tuple[Chart, ...]
    columns: tuple[str, ...]  # metrics.`...`, params.`...`, tags.`...`


def study_view(name: str, parent_id: str, runs: int) -> View:
    """The curves of all children of a run."""
    curves = ("train/loss", "val/error", "train/top1", "perf/images_per_s")
    columns = (metric_column("train/loss"), metric_column("val/error"))
    return View(name, children_of(parent_id), runs, "val/error", True, tuple(map(Chart, curves)), columns)


def sweep_view(name: str, parent_id: str, params: Sequence[str], metric: str, *, more_is_better: bool,
               runs: int) -> View:  # fmt: skip
    """All children of a run, best first: what was varied beside the result, and the curves.

    `params` are the dotted names of what varies; `metric` is what the sweep goes by. Accuracies count by their best,
    as MLflow's list knows the last value alone. Any number of runs: they are searched by their parent.
    """
    result = {"val/top1": "val/top1_best"}.get(metric, metric)
    curves = dict.fromkeys(["val/top1", metric, "train/loss", "val/loss"])
    charts = (Chart(result, "PARALLEL", tuple(params)), Chart(result, "BAR"), *map(Chart, curves))
    columns = [metric_column(key) for key in dict.fromkeys([result, metric])]
    columns += [f"params.`{name}`" for name in params] + ["tags.`skiplane.state`"]
    return View(name, children_of(parent_id), runs, result, not more_is_better, charts, tuple(columns))


def children_of(parent_id: str) -> str:
    """As MLflow searches them; of any number, where ids would fill a view's 20,000 bytes with about 400 runs."""
    return f"tags.`mlflow.parentRunId` = '{parent_id}'"


def metric_column(metric: str) -> str:
    """A metric as MLflow names columns and orders."""
    return f"metrics.`{metric}`"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of one run."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{TRAINING}"


def view_url(uri: str, experiment_id: str, key: str) -> str:
    """Opens the view that `saved` made the key of."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&{MODE}"


def saved(view: View) -> tuple[str, str, str]:
    """(key, name of the experiment's tag, its value) of a view.

    The same name and runs give the same key: a study that is looked at again does not pile views up.
    """
    key = hashlib.sha256(f"{view.name} {view.where}".encode()).hexdigest()[:32]
    now = time.time_ns() // 1_000_000
    packed = base64.b64encode(zlib.compress(json.dumps(state(view)).encode())).decode()
    value = json.dumps({"name": view.name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})
    return key, f"mlflow.sharedViewState.{key}", value


def state(view: View) -> dict[str, Any]:
    """The content of a view, as MLflow's pages keep it."""
    return {
        "searchFilter": view.where, "orderByKey": metric_column(view.sort), "orderByAsc": view.ascending,
        "startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": list(view.columns), "columnOrder": [], "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL", "viewMaximized": False, "runListHidden": False, "isAccordionReordered": True,
        "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "groupBy": None, "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [{"uuid": "curves", "name": "Skiplane", "display": True, "isReordered": False,
                                "deleted": False, "isGenerated": False, "columns": 2, "cardHeight": 300}],
        "compareRunCharts": [_chart(chart, view.runs) for chart in view.charts],
    }  # fmt: skip


def _chart(chart: Chart, runs: int) -> dict[str, Any]:
    """A chart's card; a parallel one knows its axes by other names."""
    name = chart.metric if chart.kind == "LINE" else f"{chart.metric} {chart.kind}"
    card = {"uuid": name.replace("/", "-").replace(" ", "-"), "metricSectionId": "curves", "deleted": False,
            "isGenerated": False, "type": chart.kind, "metricKey": chart.metric, "displayName": chart.metric,
            "runsCountToCompare": max(runs, DRAWN)}  # fmt: skip
    if chart.kind == "PARALLEL":
        return card | {"selectedParams": list(chart.params), "selectedMetrics": [chart.metric], "showAllRuns": True}
    if chart.kind == "BAR":
        return card
    return card | {
        "selectedMetricKeys": [chart.metric], "lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear",
        "range": {}, "xAxisKey": "step", "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [],
        "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip
