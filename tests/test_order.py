"""The order of samples: tables for the edges, properties for everything else."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.order import Order


@st.composite
def orders(draw, min_streams=1, max_window=4):
    counts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
    streams = draw(st.integers(min_streams, 3))
    lanes = streams * draw(st.integers(1, 3))
    most = sum(counts) // lanes
    if not most:
        counts, most = [*counts, lanes], (sum(counts) + lanes) // lanes
    return Order(
        tuple(counts),
        draw(st.integers(0, 2**63)),
        streams,
        lanes,
        draw(st.integers(1, most)),
        draw(st.integers(0, max_window)),
    )


def epoch_ids(order, epoch, lanes=None):
    lanes = range(order.lanes) if lanes is None else lanes
    return np.stack([order.ids(epoch, step, lanes) for step in range(order.steps_per_epoch)])


@pytest.mark.parametrize(
    ("counts", "streams", "lanes", "micro_batch", "steps", "left_out"),
    [
        ((8,), 1, 1, 1, 8, 0),
        ((8,), 1, 1, 3, 2, 2),
        ((8,), 2, 2, 4, 1, 0),
        ((9,), 2, 2, 4, 1, 1),  # streams of 4 and 5: the shorter one decides
        ((3, 3, 3), 2, 2, 2, 2, 1),
        ((1250,) * 1024 + (1167,), 8, 64, 32, 625, 1167),  # ImageNet, global batch 2048
        ((180,) * 7 + (177,), 2, 4, 16, 22, 29),  # the digits
    ],
)
def test_steps_and_what_is_left_out(counts, streams, lanes, micro_batch, steps, left_out):
    order = Order(counts, 0, streams, lanes, micro_batch)
    assert (order.steps_per_epoch, order.left_out) == (steps, left_out)


@pytest.mark.parametrize(
    ("counts", "streams", "lanes", "micro_batch", "says"),
    [
        ((8,), 3, 4, 1, "3 streams do not divide 4 lanes"),
        ((8,), 1, 4, 3, "one step takes 12 samples of each of 1 streams, the shortest holds 8"),
        ((9,), 2, 2, 5, "one step takes 5 samples of each of 2 streams, the shortest holds 4"),
        ((8,), 0, 4, 1, "at least 1"),
        ((8,), 1, 1, 0, "at least 1"),
        ((), 1, 1, 1, "the shortest holds 0"),
    ],
)
def test_impossible_arithmetic_is_refused(counts, streams, lanes, micro_batch, says):
    with pytest.raises(ValueError, match=says):
        Order(counts, 0, streams, lanes, micro_batch)


def test_a_step_outside_the_epoch_is_refused():
    with pytest.raises(ValueError, match=r"step 8 is not in 0\.\.7"):
        Order((8,), 0, 1, 1, 1).ids(0, 8, [0])


def test_an_order_is_the_same_for_ever():
    """Known answers: a run that is resumed after an upgrade must not change its order."""
    order = Order((4, 3, 5), seed=7, streams=2, lanes=2, micro_batch=3, window=1)
    assert order.pieces == (((4, 7), (7, 10)), ((10, 12), (0, 4)))
    assert order.stream(0, 0).tolist() == [9, 7, 8, 4, 6, 5]
    assert order.stream(0, 1).tolist() == [2, 3, 0, 1, 10, 11]


@given(orders())
def test_streams_partition_the_samples_in_nearly_equal_parts(order):
    streams = [[i for a, b in pieces for i in range(a, b)] for pieces in order.pieces]
    assert sorted(itertools.chain.from_iterable(streams)) == list(range(order.samples))
    assert {len(s) for s in streams} <= {order.samples // order.streams, order.samples // order.streams + 1}


@given(orders(), st.integers(0, 5))
def test_a_stream_holds_its_samples_once_in_every_epoch(order, epoch):
    for stream, pieces in enumerate(order.pieces):
        ids = order.stream(epoch, stream)
        assert sorted(ids.tolist()) == sorted(i for a, b in pieces for i in range(a, b))


@given(orders(), st.integers(0, 3))
def test_an_epoch_shows_no_sample_twice(order, epoch):
    ids = epoch_ids(order, epoch)
    assert ids.shape == (order.steps_per_epoch, order.lanes, order.micro_batch)
    assert len(np.unique(ids)) == ids.size == order.samples - order.left_out


@given(orders(), st.data())
def test_lanes_are_the_same_whoever_asks_and_in_whatever_order(order, data):
    """A rank that plays some lanes, asks for epochs out of turn or starts in the middle sees what one rank sees."""
    whole = epoch_ids(order, 1)
    lanes = data.draw(st.lists(st.integers(0, order.lanes - 1), unique=True))
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    fresh = Order(order.counts, order.seed, order.streams, order.lanes, order.micro_batch, order.window)
    fresh.ids(3, 0, range(order.lanes))
    assert (fresh.ids(1, step, lanes) == whole[step][lanes]).all()


@given(orders(max_window=3))
def test_windows_hold_whole_shards_and_only_the_first_and_last_are_short(order):
    """Ids of one window come from at most `window` pieces, and a piece lies in one window."""
    if not order.window:
        return
    for stream, pieces in enumerate(order.pieces):
        windows = order.windows(0, stream)
        sizes = [len(w.pieces) for w in windows]
        assert sorted(piece for w in windows for piece in w.pieces) == sorted(pieces)
        assert all(size == min(order.window, len(pieces)) for size in sizes[1:-1])
        assert max(sizes) <= order.window or len(pieces) <= order.window


@given(orders())
def test_only_the_windows_of_the_asked_lanes_are_computed(order):
    order.ids(0, 0, [0])
    assert set(order._windows) == set(order._window_ids) == {0}
    order.ids(1, 0, range(order.lanes))
    assert {epoch for epoch, *_ in order._window_ids.values()} == {1}


@given(orders(), st.integers(0, 3))
def test_a_windows_samples_lie_where_it_says(order, epoch):
    for stream in range(order.streams):
        ids, windows = order.stream(epoch, stream), order.windows(epoch, stream)
        assert [w.begin for w in windows[1:]] == [w.end for w in windows[:-1]]
        for window in windows:
            held = [i for piece in window.pieces for i in range(*piece)]
            assert sorted(ids[window.begin : window.end].tolist()) == sorted(held)


def test_one_window_is_held_not_an_epoch():
    order = Order((100,) * 64, 0, 1, 1, 10, window=4)
    order.ids(0, order.steps_per_epoch - 1, [0])
    assert sum(len(ids) for *_, ids in order._window_ids.values()) <= 400


@given(orders())
def test_a_samples_shard_is_found(order):
    shards = np.repeat(np.arange(len(order.counts)), order.counts)
    assert [order.shard_of(i) for i in range(order.samples)] == shards.tolist()


def test_epochs_and_seeds_differ_and_each_leaves_out_others():
    order = Order((50,) * 8, 0, 2, 4, 7)
    assert (order.stream(0, 0) != order.stream(1, 0)).any()
    assert order.pieces != Order((50,) * 8, 1, 2, 4, 7).pieces
    shown = [set(epoch_ids(order, epoch).ravel().tolist()) for epoch in range(2)]
    assert order.left_out
    assert shown[0] != shown[1]


def test_a_full_window_meets_like_a_full_permutation():
    """Over many epochs, how often two given samples share a step is what chance says (chi-square, 99.9 %)."""
    order = Order((6,) * 4, 0, 1, 1, 6)
    together = np.zeros(24)
    epochs = 500
    for epoch in range(epochs):
        for row in epoch_ids(order, epoch).reshape(-1, 6):
            if 0 in row:
                together[row] += 1
    expected = epochs * 5 / 23
    chi2 = ((together[1:] - expected) ** 2 / expected).sum()
    assert chi2 < 48.3  # 22 degrees of freedom


def test_streams_change_windows_at_different_steps():
    order = Order((10,) * 64, 3, 4, 4, 5, window=8)
    firsts = [len(order.windows(0, stream)[0].pieces) for stream in range(4)]
    assert len(set(firsts)) > 1
