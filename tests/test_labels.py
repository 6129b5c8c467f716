"""Classes of adopted labels, and whether tars are random samples of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import DataError
from pipelines.packing.labels import describe_order, name_classes, order_chi2


@pytest.mark.parametrize(
    ("labels", "given", "classes", "numbers"),
    [
        (["2", "0"], (), ("0", "1", "2"), {"2": 2, "0": 0}),
        (["b", "a", "B"], (), ("B", "a", "b"), {"B": 0, "a": 1, "b": 2}),
        (["1", "x"], ("y", "x"), ("y", "x"), {"1": 1, "y": 0, "x": 1}),
        (["-1", "a"], (), ("-1", "a"), {"-1": 0, "a": 1}),  # no whole number: a name
        ([], (), (), {}),
    ],
)
def test_classes(labels, given, classes, numbers):
    assert name_classes(labels, given) == (classes, numbers)


def test_numbers_and_names_are_not_mixed():
    with pytest.raises(DataError, match="'0', '-1'"):
        name_classes(["0", "-1"])


def test_chi2_by_hand():
    """Halves of 2 and 2: each differs by 1 from an expected 1 in both classes, chi^2 2, where a shuffle gives 2/3."""
    assert order_chi2([[0, 0], [1, 1]]) == 3.0
    assert order_chi2([[0, 1], [1, 0]]) == 0.0


@pytest.mark.parametrize("shards", [[[0, 1, 2]], [[0, 0], [0]], [[]], [[3], [3]]])
def test_one_shard_or_class_has_no_order(shards):
    assert order_chi2(shards) is None
    assert describe_order(None, 1, 1).startswith("one shard or class")


@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 1000))
def test_a_shuffle_gives_one_whatever_the_number_of_shards_and_sorting_much_more(classes, shards, seed):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 60)
    found = np.mean([order_chi2(np.array_split(rng.permutation(labels), shards)) for _ in range(10)])
    assert abs(found - 1) < 6 * (2 / (classes - 1) / shards / 10) ** 0.5 + 0.05
    assert order_chi2(np.array_split(labels, shards)) > 5 or classes < shards


@pytest.mark.parametrize(
    ("chi2", "classes", "shards", "says"),
    [
        (1.02, 1000, 1025, "about 1 or less: shuffled"),
        (1.6, 1000, 1025, "not well shuffled"),
        (37.1, 1000, 1025, "sorted by class, or nearly"),
        (2.5, 4, 5, "about 1 or less: shuffled"),  # 1.5 + 4 * sqrt(2 / 3 / 5) = 2.96
        (9.0, 2, 2, "sorted by class"),
    ],
)
def test_in_words(chi2, classes, shards, says):
    said = describe_order(chi2, classes, shards)
    assert said.startswith(f"chi^2 of the shards' labels is {chi2:.2f} a degree of freedom, ")
    assert says in said
    assert ("data.window 0 and data.streams 1" in said) == ("shuffled" not in says or "not" in says)
