"""Many nodes' samples -> least, mean, greatest, and who is worst."""

import pytest

from orchestrator.nodes import Newest, Spread, curves, spreads, worst

A = {"cpu_percent": 70.0, "memory_percent": 81.0, "net_in_mb_per_s": 5.0}
B = {"cpu_percent": 97.1, "memory_percent": 60.0, "gpu_utilization_percent": 40.0, "gpu_power_w": 300.0}
C = {"cpu_percent": 88.9, "memory_percent": 60.0, "gpu_utilization_percent": 90.0, "gpu_power_w": 500.0}


@pytest.mark.parametrize(
    ("samples", "name", "spread"),
    [
        ({"a": A}, "cpu_percent", Spread(70.0, 70.0, 70.0, "a", "a")),
        ({"a": A, "b": B}, "memory_percent", Spread(60.0, 70.5, 81.0, "b", "a")),
        ({"c": C, "b": B, "a": A}, "memory_percent", Spread(60.0, 67.0, 81.0, "b", "a")),  # b and c are alike: b
        ({"a": A, "b": B, "c": C}, "gpu_power_w", Spread(300.0, 400.0, 500.0, "b", "c")),  # a has no GPU
        ({"a": A, "b": B}, "net_in_mb_per_s", Spread(5.0, 5.0, 5.0, "a", "a")),
    ],
)
def test_spread(samples, name, spread):
    assert spreads(samples)[name] == spread


def test_spreads_of_nothing():
    assert spreads({}) == {}
    assert curves({}) == {}
    assert worst({}) == ""


def test_one_node_has_one_curve_of_each_value():
    assert curves({"b": B}) == {
        "system/cpu_percent": 97.1,
        "system/memory_percent": 60.0,
        "gpu/utilization_percent": 40.0,
        "gpu/power_w": 300.0,
    }


def test_several_nodes_have_least_and_greatest_beside_the_mean():
    found = curves({"b": B, "c": C})
    assert len(found) == 3 * 4
    assert {key: value for key, value in found.items() if key.startswith("gpu/utilization_percent")} == {
        "gpu/utilization_percent": 65.0,
        "gpu/utilization_percent_least": 40.0,
        "gpu/utilization_percent_greatest": 90.0,
    }


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"a": A}, ""),
        ({"a": A, "twin": A}, ""),
        ({"node-1": A, "node-3": B}, "cpu_percent node-3 97.1; memory_percent node-1 81.0"),
        ({"b": B, "c": C}, "cpu_percent b 97.1; gpu_utilization_percent b 40.0"),  # an idle GPU is the bad one
    ],
)
def test_who_is_worst(samples, words):
    assert worst(samples) == words


def test_a_node_that_is_silent_drops_out_and_samples_are_news_once():
    now = [0.0]
    nodes = Newest(30.0, lambda: now[0])
    assert nodes.news() == {}
    nodes.add("a", A)
    now[0] = 20.0
    nodes.add("b", B)
    assert nodes.news() == {"a": A, "b": B}
    assert nodes.news() == {}
    now[0] = 31.0
    assert nodes.now() == {"b": B}
    nodes.add("b", C)
    assert nodes.news() == {"b": C}
