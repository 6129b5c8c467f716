"""Tracking without a server: names, addresses, links. The journal and its way are in the tests beside."""

import base64
import json
import socket
import time
import zlib
from typing import Any

import pytest

from orchestrator.tracking import Metric, NullTracker, Shipped, address, left_line, views
from pipelines.errors import ClusterError, ConfigError


def point(step: int, key: str = "train/loss", value: float = 0.5) -> Metric:
    return Metric(key, value, step, 1000 + step)


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train/loss", "val/top-1", "a.b_c:d e", "x" * 250])
def test_good_metric_names(key: str) -> None:
    assert point(0, key).key == key


@pytest.mark.parametrize("key", ["", "a//b", "/a", "a/", "../a", "a/../b", ".", "top1%", "f(x)", "ä", "x" * 251])
def test_bad_metric_names_fail_at_birth(key: str) -> None:
    """MLflow would refuse the whole batch they are in."""
    with pytest.raises(ValueError, match="metric name"):
        point(0, key)


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    ["http://h:5000", "https://h/mlflow", "sqlite:////a/b.db", "postgresql+psycopg://u:p@h/db", "mysql+pymysql://h/db"],
)
def test_usable_uris(uri: str) -> None:
    address.check(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("./mlruns", "tracking.uri is ./mlruns; use http"),
        ("file:///a/mlruns", "out of service"),
        ("sqlite:///mlflow.db", "an absolute path is needed"),
        ("databricks", "use http"),
        ("ftp://me:secret@h/x", "tracking.uri is ftp://h/x; use"),
    ],
)
def test_unusable_uris(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        address.check(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@h:5000/p", "http://h:5000/p"),
        ("postgresql+psycopg://me:s%40@h/db", "postgresql+psycopg://h/db"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("http://h", "http://h"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert address.without_password(uri) == shown


@pytest.mark.parametrize("scheme", ["http://me:secret@", "postgresql+psycopg://me:secret@"])
def test_port_nobody_listens_on(scheme: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterError, match=r"does not answer .*jobs\.local up") as caught:
            address.probe(f"{scheme}127.0.0.1:{closed.getsockname()[1]}")
    assert "secret" not in str(caught.value)


def test_silent_server_is_known_within_ten_seconds() -> None:
    """It takes the connection and says nothing, as a stopped process does. Ten seconds are the promise."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(ClusterError, match=r"does not answer \(timed out\)"):
            address.probe(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - began < 10


# -- views -------------------------------------------------------------------------------------------------------------


def opened(view: views.View) -> dict[str, Any]:
    """What MLflow's pages read from the experiment's tag."""
    _, _, value = views.saved(view)
    assert len(value) < 20_000  # what MLflow takes
    return json.loads(zlib.decompress(base64.b64decode(json.loads(value)["state"].removeprefix("deflate;"))))


def test_saved_view_shows_loss_and_error_of_all_runs() -> None:
    view = views.study_view("demo", "p" * 32, 12)
    key, name, value = views.saved(view)
    assert name == f"mlflow.sharedViewState.{key}"
    assert json.loads(value)["name"] == "demo"
    state = opened(view)
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{'p' * 32}'"
    assert state["runsHiddenMode"] == "SHOW_ALL"  # by default only ten are drawn
    assert [chart["metricKey"] for chart in state["compareRunCharts"]][:2] == ["train/loss", "val/error"]
    assert views.view_url("http://h/", "3", key).startswith("http://h/#/experiments/3/runs?viewStateShareKey=")


def test_view_of_the_same_runs_replaces_itself() -> None:
    keys = {views.saved(views.study_view("demo", parent, runs))[0] for parent, runs in (("a", 4), ("a", 8), ("b", 4))}
    assert len(keys) == 2


def sweep(metric: str = "val/top1", runs: int = 12) -> views.View:
    return views.sweep_view(
        "s1", "p" * 32, ["model.depth", "optim.lr"], metric, more_is_better=metric != "val/loss", runs=runs
    )


def test_view_of_a_sweep_has_its_children_best_first() -> None:
    state = views.state(sweep())
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{'p' * 32}'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/top1_best`", False)
    assert state["selectedColumns"] == ["metrics.`val/top1_best`", "metrics.`val/top1`", "params.`model.depth`",
                                        "params.`optim.lr`", "tags.`skiplane.state`"]  # fmt: skip
    shown = [(chart["type"], chart["metricKey"]) for chart in state["compareRunCharts"]]
    assert shown == [("PARALLEL", "val/top1_best"), ("BAR", "val/top1_best"), ("LINE", "val/top1"),
                     ("LINE", "train/loss"), ("LINE", "val/loss")]  # fmt: skip
    parallel = state["compareRunCharts"][0]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (["model.depth", "optim.lr"], ["val/top1_best"])
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == 5


def test_view_of_a_sweep_by_loss_has_the_least_first() -> None:
    state = views.state(sweep("val/loss"))
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/loss`", True)
    assert state["selectedColumns"][:2] == ["metrics.`val/loss`", "params.`model.depth`"]


def test_view_of_a_sweep_is_as_small_for_a_thousand_trials() -> None:
    assert views.saved(sweep(runs=12))[0] == views.saved(sweep(runs=1000))[0]
    assert len(views.saved(sweep(runs=1000))[2]) < 4_000
    assert all(chart["runsCountToCompare"] == 1000 for chart in opened(sweep(runs=1000))["compareRunCharts"])


# -- without a tracker -------------------------------------------------------------------------------------------------


def test_null_tracker_hears_everything() -> None:
    silent = NullTracker()
    silent.metrics([point(0)])
    silent.tags({"a": "b"})
    silent.note("")
    silent.file(b"", "f")
    silent.table([{"a": 1}], "f.json")
    silent.model("checkpoints/step-1")
    assert (silent.view(views.study_view("v", "p", 1)), silent.run_id, silent.url) == (None, None, None)
    assert silent.finish("FINISHED") == Shipped()


def test_what_is_left_is_said_with_the_command_that_sends_it() -> None:
    assert left_line(Shipped(1500, 300, 0), "/runs/a", "http://h") == (
        "tracking: 1,200 of 1,500 records wait in /runs/a; this sends them: python -m jobs.tracking sync /runs/a"
    )
    assert left_line(Shipped(15, 0, 0), "/runs/a", "offline") == (
        "tracking: 15 of 15 records wait in /runs/a; this sends them: python -m jobs.tracking sync /runs/a --uri URI"
    )
    assert left_line(Shipped(10, 10, 2), "/runs/a", "http://h") == (
        "tracking: 2 were refused, see /runs/a/tracking/refused.jsonl; this tries them again: "
        "python -m jobs.tracking sync /runs/a --refused"
    )
