"""The points of a space: a grid in its order, draws that follow from seed and number alone."""

import math
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.sweep import space as module
from orchestrator.sweep.space import By, Range, Space, Values, draws, grid, size
from pipelines.errors import ConfigError

DEPTHS = Values((18, 34, 50))
RATES = Range(0.01, 1.0, log=True)
BATCHES = By("model.depth", ((18, Values((256,))), (34, Values((64, 128))), (50, Values((32,)))))

# As drawn on the day this was written: a sweep that goes on must draw them again.
FIRST = [(34, 0.07575, 14), (18, 0.01376, 24), (34, 0.02423, 17)]
SHUFFLED = [34, 50, 18]

# -- strategies --------------------------------------------------------------------------------------------------------

lists = st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True).map(lambda v: Values(tuple(v)))
floats = st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.booleans()).filter(lambda r: r[0] < r[1])
ranges = floats.map(lambda r: Range(*r))
wholes = st.tuples(st.integers(1, 400), st.integers(1, 400), st.booleans()).filter(lambda r: r[0] < r[1])
whole_ranges = wholes.map(lambda r: Range(*r, whole=True))


@st.composite
def listed(draw_from: st.DrawFn) -> Space:
    """Up to three lists, and up to two conditions on one of them."""
    free = {f"a{i}": draw_from(lists) for i in range(draw_from(st.integers(1, 3)))}
    bound = {}
    for i in range(draw_from(st.integers(0, 2))):
        other = draw_from(st.sampled_from(sorted(free)))
        bound[f"b{i}"] = By(other, tuple((value, draw_from(lists)) for value in free[other].values))
    return Space(bound | free)


# -- grid --------------------------------------------------------------------------------------------------------------


def test_the_last_dimension_is_the_fastest() -> None:
    found = grid(Space({"model.depth": Values((18, 34)), "optim.lr": Values((0.1, 1.0))}))
    assert [tuple(point.values()) for point in found] == [(18, 0.1), (18, 1.0), (34, 0.1), (34, 1.0)]


def test_a_condition_stands_behind_what_it_looks_at() -> None:
    space = Space({"train.global_batch": BATCHES, "model.depth": DEPTHS})
    assert list(space.dimensions) == ["model.depth", "train.global_batch"]
    assert [tuple(p.values()) for p in grid(space)] == [(18, 256), (34, 64), (34, 128), (50, 32)]


@settings(deadline=None)
@given(listed())
def test_a_grid_has_as_many_points_as_its_size_and_each_once(space: Space) -> None:
    points = grid(space)
    assert len(points) == size(space) == len({tuple(point.items()) for point in points})


@pytest.mark.parametrize(
    ("dimensions", "points"),
    [
        ({"a": Values((1,))}, 1),
        ({"a": Values((1, 2)), "b": Values((1, 2, 3))}, 6),
        ({"a": Range(1, 4, whole=True)}, 4),
        ({"a": Values((1, 2)), "b": Range(0.0, 1.0)}, None),
        ({"model.depth": DEPTHS, "b": BATCHES}, 4),
        ({"model.depth": DEPTHS, "b": BATCHES, "c": BATCHES, "d": Values((1, 2))}, 12),  # (1 + 2 * 2 + 1) * 2
        ({"model.depth": Values((18,)), "b": By("model.depth", ((18, RATES),))}, None),  # one case is countless
        ({"a": Values((1, 2)), "b": By("a", ((1, Values((5,))), (2, Range(3, 5, whole=True))))}, 4),
    ],
)
def test_the_size_of_a_space(dimensions, points) -> None:
    assert size(Space(dimensions)) == points


# -- draws -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(listed(), st.integers(0, 2**32 - 1))
def test_a_random_search_of_a_grid_is_its_points_in_another_order(space: Space, seed: int) -> None:
    points = draws(space, seed, size(space) or 0)
    assert sorted(map(str, points)) == sorted(map(str, grid(space)))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_a_draw_follows_from_seed_and_number_alone(seed: int, number: int) -> None:
    space = Space({"model.depth": DEPTHS, "optim.lr": RATES, "train.global_batch": BATCHES})
    assert draws(space, seed, number) == draws(space, seed, 13)[:number]


def test_what_was_drawn_once_is_drawn_for_ever() -> None:
    space = Space({"model.depth": Values((18, 34)), "optim.lr": RATES, "model.width": Range(8, 64, True, True)})
    assert [tuple(point.values()) for point in draws(space, 0, 3)] == FIRST
    assert [point["model.depth"] for point in draws(Space({"model.depth": DEPTHS}), 7, 3)] == SHUFFLED


def test_another_seed_draws_others() -> None:
    space = Space({"optim.lr": RATES})
    assert draws(space, 0, 5) != draws(space, 1, 5)


@settings(deadline=None)
@given(st.one_of(ranges, whole_ranges), st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_lies_inside_and_is_its_own_text(found: Range, share: float) -> None:
    value = found.draw(share)
    assert found.low <= value <= found.high
    assert isinstance(value, int) == found.whole
    if value not in (found.low, found.high):
        assert float(f"{value:.4g}") == value


@pytest.mark.parametrize(
    ("found", "share", "value"),
    [
        (Range(1, 3, whole=True), 0.0, 1),
        (Range(1, 3, whole=True), 0.34, 2),
        (Range(1, 3, whole=True), 0.999, 3),  # both ends weigh as much as what lies between
        (Range(1, 3, True, True), 0.49, 1),  # log: 1 has the weight of 1..2, half of 1..4
        (Range(1, 3, True, True), 0.51, 2),
        (Range(0.01, 1.0, log=True), 0.5, 0.1),
        (Range(0.0, 1.0), 1 / 3, 0.3333),
        (Range(-1.0, 1.0), 0.25, -0.5),
        (Range(0.12345, 0.12346), 0.5, 0.12346),  # four digits would leave the range: its end
    ],
)
def test_a_share_of_a_range(found: Range, share: float, value: float) -> None:
    assert found.draw(share) == value


def test_a_log_range_is_drawn_alike_in_every_decade() -> None:
    decades = Counter(math.floor(math.log10(p["optim.lr"])) for p in draws(Space({"optim.lr": RATES}), 3, 1000))
    assert 450 < decades[-1] < 550
    assert 450 < decades[-2] < 550


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(1, 20), st.integers(0, 1000))
def test_a_range_of_integers_is_drawn_without_repetition_to_its_end(low: int, more: int, seed: int) -> None:
    found = Range(low, low + more, whole=True)
    points = draws(Space({"a": found}), seed, int(found.size))
    assert sorted(p["a"] for p in points) == list(range(int(found.low), int(found.high) + 1))


def test_there_are_no_more_draws_than_points() -> None:
    for found in (DEPTHS, Range(1, 3, whole=True)):
        space = Space({"a": found})
        assert len(draws(space, 0, 9)) == 3


def test_a_grid_too_large_to_shuffle_is_drawn_point_by_point(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space({"a": Values(tuple(range(40))), "b": Values(tuple(range(40)))})
    monkeypatch.setattr(module, "SHUFFLED", 100)
    monkeypatch.setattr(module, "grid", None)  # not even asked for
    points = draws(space, 0, 400)
    assert len({tuple(point.items()) for point in points}) == 400


def test_a_condition_is_drawn_with_what_it_looks_at() -> None:
    cases = ((18, Range(1.0, 2.0)), (34, Values((5.0, 6.0))))
    space = Space({"b": By("a", cases), "a": Values((18, 34))})
    for point in islice(draws(space, 0, 50), 50):
        assert 1.0 <= point["b"] <= 2.0 if point["a"] == 18 else point["b"] in (5.0, 6.0)


# -- points of a range -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "count", "values"),
    [
        (Range(0.01, 1.0, log=True), 3, (0.01, 0.1, 1.0)),
        (Range(0.0, 1.0), 5, (0.0, 0.25, 0.5, 0.75, 1.0)),
        (Range(0.012345, 1.0), 2, (0.012345, 1.0)),  # the ends as they are written
        (Range(8, 64, True, True), 4, (8, 16, 32, 64)),
        (Range(1, 10, whole=True), 4, (1, 4, 7, 10)),
    ],
)
def test_a_range_with_points_is_a_list(found: Range, count: int, values: tuple[float, ...]) -> None:
    assert found.spread(count) == Values(values)


@settings(deadline=None)
@given(ranges, st.integers(2, 9))
def test_points_rise_and_hold_both_ends(found: Range, count: int) -> None:
    values = found.spread(count).values
    assert (values[0], values[-1], len(values)) == (found.low, found.high, count)
    assert list(values) == sorted(values)


# -- text, refusals ----------------------------------------------------------------------------------------------------


def test_a_space_as_text_says_all_of_it() -> None:
    space = Space({"model.depth": DEPTHS, "optim.lr": RATES, "data.flip": Values((True, False)), "x": BATCHES})
    assert space.lines() == [
        "model.depth 18,34,50",
        "optim.lr 0.01:1.0:log",
        "data.flip true,false",
        "x by model.depth: 18 -> 256; 34 -> 64,128; 50 -> 32",
    ]


def test_a_case_that_cannot_be_met_is_left_out() -> None:
    space = Space({"model.depth": Values((34,)), "x": BATCHES})
    assert space.lines() == ["model.depth 34", "x by model.depth: 34 -> 64,128"]


@pytest.mark.parametrize(
    ("dimensions", "sentence"),
    [
        ({}, "the sweep has no dimension; name a setting and its values, such as --sweep.depth 18,34"),
        ({"x": BATCHES}, "sweep.x goes by model.depth, which is no list of values in this space; give one"),
        ({"x": BATCHES, "model.depth": Range(18, 34, whole=True)}, "sweep.x goes by model.depth, which is no list"),
        ({"x": BATCHES, "model.depth": By("x", ())}, "sweep.x goes by model.depth, which is no list"),
        (
            {"x": BATCHES, "model.depth": Values((18, 101, 152))},
            "sweep.x goes by model.depth and says nothing for 101, 152; every value of model.depth needs a case",
        ),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused(dimensions, sentence) -> None:
    with pytest.raises(ConfigError) as caught:
        Space(dimensions)
    assert sentence in str(caught.value)
