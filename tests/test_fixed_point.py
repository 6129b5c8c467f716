"""Sums that know no order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training import fixed_point
from orchestrator.training.fixed_point import FixedPointSum


def fixed_point_sum(values, sizes, singles=0):
    return FixedPointSum(sizes, singles, len(values), 1)(list(values)).clone()


def lane_values(seed, lanes, sizes):
    """Numbers like gradients: each tensor at a magnitude of its own, from 1e-30 to 1e30."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-30, 30, len(sizes))
    columns = [rng.normal(size=(lanes, n)) * scale for n, scale in zip(sizes, scales, strict=True)]
    return torch.from_numpy(np.concatenate(columns, axis=1)).float()


@given(st.integers(0, 2**32), st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_fixed_point_sum_knows_no_order_and_is_finer_than_float(seed, lanes, sizes):
    values = lane_values(seed, lanes, sizes)
    total = fixed_point_sum(values, sizes)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(lanes))
    assert torch.equal(total, fixed_point_sum(values[order], sizes))
    exact = [math.fsum(column) for column in values.double().T.tolist()]
    largest = torch.repeat_interleave(
        torch.stack([part.abs().max() for part in values.split(sizes, dim=1)]), torch.tensor(sizes)
    )
    error = (total.double() - torch.tensor(exact, dtype=torch.float64)).abs()
    # half a unit of float32 in the sum itself, and 2**-50 of the tensor's largest value for the rounding of the lanes
    assert (error <= total.double().abs() * 2**-24 + largest.double() * 2**-50 + 1e-45).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_poisons_its_tensor_and_no_other(value):
    values = torch.ones(3, 5)
    values[1, 2] = value
    total = fixed_point_sum(values, [2, 3])
    assert total[:2].tolist() == [3.0, 3.0]
    assert total[2:].isnan().all()


def test_fixed_point_sum_of_extremes():
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([[0.0, 1e-45, largest, 1.0], [0.0, 1e-45, -largest, -1.0]])
    assert fixed_point_sum(values, [], singles=4).tolist() == pytest.approx([0.0, 2.8e-45, 0.0, 0.0], rel=0.01)


def test_chunks_change_nothing(monkeypatch):
    values = lane_values(0, 3, [70, 5, 25])
    whole = fixed_point_sum(values, [70, 5], singles=25)
    monkeypatch.setattr(fixed_point, "CHUNK", 7)
    assert torch.equal(fixed_point_sum(values, [70, 5], singles=25), whole)


def test_a_number_of_its_own_power_is_not_drowned():
    values = torch.tensor([[1e30, 1e-30], [1e30, 2e-30]])
    assert fixed_point_sum(values, [2])[1] == 0  # below 2**-61 of its tensor's largest
    assert fixed_point_sum(values, [1], singles=1)[1].item() == pytest.approx(3e-30)


def test_the_same_object_adds_again():
    add, values = FixedPointSum([3], 2, 2, 1), lane_values(1, 2, [3, 2])
    first = add(list(values)).clone()
    add(list(values * 3))
    assert torch.equal(add(list(values)), first)
