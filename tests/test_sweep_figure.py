"""The picture of a sweep, read back from its SVG."""

import re

import pytest

from orchestrator.sweep import figure
from orchestrator.sweep.trial import Trial
from tests.ended import trial, twelve

TOP1 = "val/top1"
PLAIN, RESNET = (colour.lower() for colour in figure.FAMILIES.values())


def svg(trials: list[Trial], metric: str = TOP1) -> str:
    return figure.pareto(trials, metric)["svg"].decode()


def panels(text: str) -> list[str]:
    """The left and the right axes."""
    return re.split(r'<g id="axes_\d">', text.split('<g id="legend_1">')[0])[1:]


def points(panel: str, colour: str, hollow: bool) -> int:
    """How many points of that look were drawn; each is one use of a marker."""
    look = f'fill: {"none" if hollow else colour}[^"]*stroke: {colour}'
    return len([use for use in re.findall(r'<use [^>]*style="([^"]*)"', panel) if re.search(look, use)])


def test_every_trial_with_a_value_is_a_point_in_both_panels() -> None:
    for panel in panels(svg(twelve())):
        assert (points(panel, PLAIN, False), points(panel, PLAIN, True)) == (4, 2)
        assert (points(panel, RESNET, False), points(panel, RESNET, True)) == (5, 0)


def test_front_joins_what_is_not_beaten() -> None:
    """On the left two trials, on the right the best one alone: all took the same time."""
    left, right = panels(svg(twelve()))
    fronts = [re.findall(rf'<path d="([^"]*)"[^>]*stroke: {figure.FRONT}; stroke-width: 1.2', p) for p in (left, right)]
    assert [len(lines) for lines in fronts] == [1, 1]
    assert fronts[0][0].count("L") == 2  # over, then up: a staircase


def test_same_trials_give_the_same_bytes() -> None:
    first, second = figure.pareto(twelve(), TOP1), figure.pareto(twelve(), TOP1)
    assert first == second
    assert first["png"].startswith(b"\x89PNG")


def test_each_net_bears_its_depth_once() -> None:
    for panel in panels(svg(twelve())):
        texts = re.findall(r'<g id="text_\d+">(.*?)</g>', panel, re.DOTALL)
        assert [sum(f"fill: {colour}" in text for text in texts) for colour in (PLAIN, RESNET)] == [2, 2]


def test_wide_costs_lie_on_a_logarithmic_axis() -> None:
    near, far = (trial(1, top1=0.9), trial(2, top1=0.8, seconds=20.0)), trial(3, top1=0.7, seconds=900.0)
    assert "<!-- 500 -->" in panels(svg([*near, far]))[1]
    assert "<!-- 500 -->" not in panels(svg([*near, trial(3, top1=0.7, seconds=20.0)]))[1]


def test_a_loss_is_drawn_as_it_is_and_less_is_better() -> None:
    text = svg([trial(1, top1=0.9), trial(2, "resnet-34", 0.5)], "val/loss")
    assert "<!-- val loss -->" in text
    assert "<!-- not run to the end -->" not in text
    assert "<!-- plain nets -->" not in text


@pytest.mark.parametrize("trials", [[], [trial(1)], [trial(1, top1=0.9, seconds=0.0)]])
def test_little_or_nothing_to_draw(trials: list[Trial]) -> None:
    points_drawn = [points(panel, RESNET, False) for panel in panels(svg(trials))]
    assert points_drawn == 2 * [len([t for t in trials if t.reports])]
