"""infra/observability asks for what the code makes, by its right name, and says so to Prometheus and Grafana."""

import copy
import json
import re
import shutil
import subprocess

import pytest
import yaml
from jsonschema import Draft202012Validator

from orchestrator.context import LocalContext
from orchestrator.feed import Feed
from orchestrator.meters import RUN, WORKER
from orchestrator.odometer import Odometer
from pipelines.remote.transfer import Fetched, Reads
from tests import manifests, promql

FOLDER = manifests.ROOT / "infra" / "observability"
DASHBOARD = json.loads((FOLDER / "run-dashboard.json").read_text())
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
SCRAPE = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
[POD_MONITOR] = manifests.documents((FOLDER / "podmonitor.yaml").read_text())
OURS = {meter.shown_name for meter in (*WORKER, *RUN)}
# Ray's own: tests/scrape.py finds those of a machine without GPUs on a real node's page.
NODE = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "ray_node_disk_free",
}
GPU = {"ray_node_gpus_utilization", "ray_node_gram_used"}
LABELS = {"run", "rank"}
UNITS = {"percent", "percentunit", "s", "short", "suffix: img/s", "Bps", "bytes", "decmbytes"}


def asked(dashboard=DASHBOARD, rules=RULES):
    """(where, expression) of all that is asked of Prometheus."""
    for panel in dashboard["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", []))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]
    yield from ((note["name"], note["expr"]) for note in dashboard["annotations"]["list"])
    yield from ((rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"])


def unknown(expression):
    """Names of metrics and labels in it that nobody makes."""
    return (promql.names(expression) - OURS - NODE - GPU) | (promql.labels(expression) - LABELS)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "names", "labels"),
    [
        ("a", {"a"}, set()),
        ("sum by (run, rank) (rate(a_total{run=~\"$run\", rank='0'}[$__rate_interval])) / b", {"a_total", "b"}, LABELS),
        ("max by (run) (a{x!=\"y\"}) > 0.5 and on (run) b > 1e3", {"a", "b"}, {"run", "x"}),
        ("a - min_over_time(a[30m]) > 2 or rte(a[5m])", {"a", "rte"}, set()),
        ("label_values(a, run)", {"a"}, {"run"}),
    ],
)  # fmt: skip
def test_what_an_expression_names(expression, names, labels):
    assert (promql.names(expression), promql.labels(expression)) == (names, labels)


def test_every_name_is_one_that_the_code_or_ray_makes():
    assert {where: unknown(expression) for where, expression in asked() if unknown(expression)} == {}


def test_any_typo_in_a_name_is_found():
    for _, expression in asked():
        for name in promql.names(expression) | promql.labels(expression):
            assert unknown(re.sub(rf"\b{name}\b", f"{name}z", expression)), (name, expression)


def test_all_that_the_code_makes_is_asked_for():
    assert set().union(*(promql.names(expression) for _, expression in asked())) & OURS == OURS


def test_what_workers_count_is_what_the_table_has(monkeypatch):
    """All names that an odometer and a feed can tell; those of gauges are in test_vitals.py."""
    context = LocalContext()
    feed = Feed.__new__(Feed)
    monkeypatch.setattr(
        feed, "_supply", type("Supply", (), {"fetched": Fetched(1, 20, 3, 4, 5), "reads": Reads(6, 7)}), raising=False
    )
    odometer = Odometer(context, "a", 1, feed.counts)
    for name in ("evaluation", "checkpoint"):
        with odometer.timing(name):
            pass
    odometer.tell()
    assert context.counted.keys() == {meter.name for meter in WORKER}
    fetched = {name: context.counted[f"{name}_total"] for name in ("cache_hits", "cache_misses", "fetched_bytes")}
    assert fetched == {"cache_hits": 6, "cache_misses": 7, "fetched_bytes": 24}


def test_the_readme_has_every_metric_with_its_meaning():
    rows = re.findall(r"^\| `(ray_skiplane_\w+)` \| (.*) \|$", (FOLDER / "README.md").read_text(), re.M)
    assert rows == [(meter.shown_name, meter.meaning) for meter in (*WORKER, *RUN)]


# -- Prometheus --------------------------------------------------------------------------------------------------------

WORD = {"type": "string", "minLength": 1}
SPAN = {"type": "string", "pattern": r"^\d+[smh]$"}


def strict(required, **properties):
    """An object that has these fields, and no others but those in `properties`."""
    return {
        "type": "object",
        "properties": required | properties,
        "required": list(required),
        "additionalProperties": False,
    }


def several(schema):
    return {"type": "array", "minItems": 1, "items": schema}


def relabelling(source):
    """Prometheus' own file and its operator spell one field apart."""
    keep = strict({source: several(WORD), "regex": WORD, "action": {"const": "keep"}})
    return {"anyOf": [keep, strict({"regex": WORD, "action": {"const": "labeldrop"}})]}


FILES = several(strict({"files": several(WORD), "refresh_interval": SPAN}))
JOB = strict(
    {
        "job_name": WORD,
        "file_sd_configs": FILES,
        "metric_relabel_configs": several(relabelling("source_labels")),
    }
)
RULE = strict(
    {
        "alert": WORD,
        "expr": WORD,
        "labels": strict({"severity": {"enum": ["info", "warning"]}}),
        "annotations": strict({"summary": WORD, "description": WORD}),
    },
    **{"for": SPAN},
)
ENDPOINT = strict({"port": WORD, "interval": SPAN, "metricRelabelings": several(relabelling("sourceLabels"))})
NAMES = {"type": "object", "additionalProperties": WORD, "minProperties": 1}
SCHEMAS = {
    "prometheus.yaml": strict(
        {
            "global": strict({"scrape_interval": SPAN, "evaluation_interval": SPAN}),
            "rule_files": several(WORD),
            "scrape_configs": several(JOB),
        }
    ),
    "rules.yaml": strict({"groups": several(strict({"name": WORD, "rules": several(RULE)}))}),
    "podmonitor.yaml": strict(
        {
            "apiVersion": {"const": "monitoring.coreos.com/v1"},
            "kind": {"const": "PodMonitor"},
            "metadata": strict({"name": WORD, "namespace": WORD, "labels": NAMES}),
            "spec": strict({"selector": strict({"matchLabels": NAMES}), "podMetricsEndpoints": several(ENDPOINT)}),
        }
    ),
}
DOCUMENTS = {"prometheus.yaml": SCRAPE, "rules.yaml": RULES, "podmonitor.yaml": POD_MONITOR}
OPTIONAL = re.compile(r"/for$")  # an alert without it is one, too


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_file_is_right_and_any_typo_in_it_is_found(name):
    schema = Draft202012Validator(SCHEMAS[name])
    assert [f"{error.json_path}: {error.message}" for error in schema.iter_errors(DOCUMENTS[name])] == []
    places = list(manifests.typos(DOCUMENTS[name]))
    assert len(places) > 10
    assert [where for where, changed in places if schema.is_valid(changed)] == []


def kept(relabellings):
    """Of a file's relabelling: the patterns of names that it keeps, and of labels that it drops."""
    found = {one["action"]: one["regex"] for one in relabellings}
    return found["keep"], found["labeldrop"]


@pytest.mark.parametrize(
    "relabellings",
    [
        SCRAPE["scrape_configs"][0]["metric_relabel_configs"],
        POD_MONITOR["spec"]["podMetricsEndpoints"][0]["metricRelabelings"],
    ],
    ids=["prometheus.yaml", "podmonitor.yaml"],
)
def test_what_is_asked_for_is_kept(relabellings):
    keep, drop = kept(relabellings)
    assert [name for name in OURS | NODE | GPU if not re.fullmatch(keep, name)] == []
    assert not re.fullmatch(keep, "ray_node_disk_usage")  # and not everything
    assert [label for label in (*LABELS, "WorkerId", "NodeAddress", "ip") if re.fullmatch(drop, label)] == []


def test_kubernetes_pods_have_what_the_monitor_looks_for():
    [cluster] = manifests.documents_of("base/raycluster.yaml")
    [endpoint] = POD_MONITOR["spec"]["podMetricsEndpoints"]
    assert POD_MONITOR["metadata"]["namespace"] == manifests.documents_of("base/namespace.yaml")[0]["metadata"]["name"]
    for what, labels, pod in manifests.pods([cluster]):
        assert POD_MONITOR["spec"]["selector"]["matchLabels"].items() <= labels.items(), what
        assert endpoint["port"] in [port["name"] for one in pod["containers"] for port in one.get("ports", [])], what


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool, which comes with Prometheus, is not here")
def test_prometheus_itself_takes_the_files(tmp_path):
    for file in FOLDER.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "targets.json").write_text('[{"labels": {"job": "ray"}, "targets": ["127.0.0.1:8080"]}]')
    found = subprocess.run(["promtool", "check", "config", "prometheus.yaml"], cwd=tmp_path, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert b"4 rules found" in found.stdout
    (tmp_path / "rules.yaml").write_text((tmp_path / "rules.yaml").read_text().replace("changes(", "chnges("))
    assert subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True).returncode


# -- Grafana -----------------------------------------------------------------------------------------------------------

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def complaints(dashboard):
    """What Grafana would not show, or not find."""
    ids = [panel["id"] for panel in dashboard["panels"]]
    yield from [f"id {one} twice" for one in {*ids} if ids.count(one) > 1]
    taken = {}
    for panel in dashboard["panels"]:
        place, title = panel["gridPos"], panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if x >= 24 or taken.setdefault((x, y), title) != title:
                    yield f"{title} lies on {taken.get((x, y), 'the edge')}"
        if panel["type"] == "row":
            continue
        defaults = panel["fieldConfig"]["defaults"]
        if panel["type"] not in ("stat", "timeseries"):
            yield f"{title} is a {panel['type']}"
        if panel["datasource"] != SOURCE or any(target["datasource"] != SOURCE for target in panel["targets"]):
            yield f"{title} asks somebody else"
        if not panel["description"].endswith("."):
            yield f"{title} says nothing"
        if defaults["unit"] not in UNITS:
            yield f"{title} is in {defaults['unit']}"
        levels = [step["value"] for step in defaults["thresholds"]["steps"]]
        if levels[0] is not None or levels[1:] != sorted(levels[1:]):
            yield f"{title} has levels {levels}"
        references = [target["refId"] for target in panel["targets"]]
        if (
            not references
            or len({*references}) < len(references)
            or not all(t["legendFormat"] for t in panel["targets"])
        ):
            yield f"{title} shows {references}"


def test_grafana_finds_what_it_needs():
    assert list(complaints(DASHBOARD)) == []
    assert (DASHBOARD["uid"], DASHBOARD["schemaVersion"] >= 36, "id" in DASHBOARD) == ("skiplane-run", True, False)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "run"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["run"]["query"]["query"] == variables["run"]["definition"]
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Speed", "Learning", "Losses", "Fetching and cache (datasets on servers)", "Cluster"]
    assert all("$run" in expression for _, expression in asked() if "{" in expression and "$" in expression)


@pytest.mark.parametrize("field", ["unit", "thresholds", "gridPos", "targets", "datasource", "type", "expr", "refId"])
def test_a_field_with_a_typo_is_found(field):
    changed = copy.deepcopy(DASHBOARD)
    for place in (panel := changed["panels"][-1], panel["fieldConfig"]["defaults"], panel["targets"][0]):
        if field in place:
            place[f"{field}z"] = place.pop(field)
            break
    with pytest.raises(KeyError, match=field):
        list(complaints(changed)) + list(asked(changed))


def test_every_query_of_a_run_is_of_the_runs_that_were_chosen():
    for where, expression in asked(rules={"groups": []}):
        for name in promql.names(expression) & OURS:
            assert f'{name}{{run=~"$run"' in expression or where == "run", where
