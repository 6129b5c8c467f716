"""The data digest: additive, order-free, and moved by every single thing that it covers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.digest import digest

BASE = {"epoch": 1, "step": 2, "slots": [0, 1, 2], "ids": [10, 11, 12], "crcs": [7, 8, 9]}


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 2},
        {"step": 1},
        {"epoch": 2, "step": 1},
        {"slots": [0, 1, 3]},
        {"slots": [1, 0, 2]},
        {"ids": [11, 10, 12]},
        {"ids": [10, 11, 13]},
        {"crcs": [7, 8, 2**32 - 1]},
        {"ids": [10, 10, 12], "crcs": [7, 7, 9]},  # a replacement
        {"slots": [0, 1], "ids": [10, 11], "crcs": [7, 8]},
    ],
)
def test_everything_it_covers_moves_it(change):
    assert digest(**BASE | change) != digest(**BASE)


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(0, 12))
def test_it_adds_over_any_split_in_any_order(order, a, b):
    slots, ids, crcs = np.arange(12), np.arange(12) * 5, np.arange(12) * 77
    cuts = [0, *sorted((a, b)), 12]
    parts = [np.array(order[i:j], np.int64) for i, j in itertools.pairwise(cuts)]
    total = sum(digest(3, 4, slots[p], ids[p], crcs[p]) for p in parts) % 2**64
    assert total == digest(3, 4, slots, ids, crcs)


def test_it_is_the_same_for_ever():
    """A run that is resumed after an upgrade goes on with its digest."""
    assert digest(**BASE) == 9370229404420790161
