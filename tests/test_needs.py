"""Which shards a node needs and when: tables of small integers, and that no step reads what was not foreseen."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.order import Order
from pipelines.remote.needs import AHEAD, InOrder, Need, Needs, shards_of
from tests.test_order import orders


def test_a_table():
    """Two streams of 8 samples in shards of 4, one shard a window, 2 samples of a stream a step: 4 steps an epoch."""
    order = Order((4, 4, 4, 4), seed=1, streams=2, lanes=2, micro_batch=2, window=1)
    first, second = ([order.shard_of(w.pieces[0][0]) for w in order.windows(0, stream)] for stream in (0, 1))
    needs = Needs(order, lanes=[0, 1], val=[0, 1])
    assert needs.upcoming(0) == [
        Need("train", first[0], 0, 1),
        Need("train", second[0], 0, 1),
        Need("train", first[1], 2, 3),
        Need("train", second[1], 2, 3),
        Need("val", 0, 3, 3 + AHEAD),
        Need("val", 1, 3, 3 + AHEAD),
    ]
    assert [n.shard for n in needs.upcoming(2) if n.split == "train"] == [first[1], second[1]]  # the others are over
    one = Needs(order, lanes=[1])
    assert [n.shard for n in one.upcoming(0)] == second  # a node asks for the shards of its streams, and no others


def test_the_next_epoch_is_foreseen_and_none_after_the_last():
    order = Order((4, 4), seed=1, streams=1, lanes=1, micro_batch=2, window=1)
    needs = Needs(order, lanes=[0], val=[0], evaluates=lambda epoch: epoch == 1, epochs=2)
    assert [(n.split, n.begin) for n in needs.upcoming(0)] == [
        ("train", 0),
        ("train", 2),
        ("train", 4),
        ("train", 6),
        ("val", 7),
    ]
    assert [(n.split, n.begin) for n in needs.upcoming(5)] == [("train", 4), ("train", 6), ("val", 7)]
    assert Needs(order, lanes=[0], epochs=1).upcoming(4) == []


def test_what_an_epoch_leaves_out_is_not_fetched():
    order = Order((4, 4, 1), seed=0, streams=1, lanes=1, micro_batch=8, window=1)  # one step of 8, one sample left
    windows = order.windows(0, 0)
    read = {order.shard_of(w.pieces[0][0]) for w in windows if w.begin < 8}
    assert {n.shard for n in Needs(order, lanes=[0]).upcoming(0)} == read
    assert len(read) == 3 - (windows[-1].begin == 8)


@given(orders(), st.data())
def test_every_sample_that_is_read_was_foreseen_in_time_and_no_other_shard(order, data):
    lanes = data.draw(st.lists(st.integers(0, order.lanes - 1), min_size=1, unique=True))
    epoch = data.draw(st.integers(0, 2))
    needs = Needs(order, lanes, epochs=3).upcoming(epoch * order.steps_per_epoch)
    assert [n.begin for n in needs] == sorted(n.begin for n in needs)
    for step in range(order.steps_per_epoch):
        at = epoch * order.steps_per_epoch + step
        read = {order.shard_of(i) for i in order.ids(epoch, step, lanes).ravel().tolist()}
        assert read <= {n.shard for n in needs if n.begin <= at <= n.end}
    streams = {order.stream_of(lane) for lane in lanes}
    own = {order.shard_of(first) for stream in streams for first, _ in order.pieces[stream]}
    assert {n.shard for n in needs} <= own


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_the_shards_of_a_range_are_those_that_hold_it(counts, data):
    starts = (0, *np.cumsum(counts).tolist())
    first = data.draw(st.integers(0, starts[-1]))
    end = data.draw(st.integers(first, starts[-1]))
    held = {shard for shard in range(len(counts)) for i in range(first, end) if starts[shard] <= i < starts[shard + 1]}
    assert set(shards_of(starts, range(first, end))) == held


def test_a_pass_in_order():
    assert InOrder("val", (0, 8, 10)).upcoming(0) == [Need("val", 0, 0, 7), Need("val", 1, 8, 9)]
    assert InOrder("val", (0, 8, 10)).upcoming(8) == [Need("val", 1, 8, 9)]
