"""Which samples make up a step: arithmetic on integers, a pure function of (counts, seed, epoch, step).

The training split is cut once a run into S equal *streams*: shards permuted by the seed, laid end to end, cut at sample
granularity. Each epoch permutes the shards inside a stream, groups them into *windows* (the first one shorter, by
another amount in each stream) and permutes the samples inside each window. A step takes the next V/S x micro_batch ids
of every stream; *lanes* are slices of that. What does not fill a last step is left out of this epoch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
# What a generator is for; part of its key, so that no two uses share numbers.
CUT, SHARDS, OFFSET, SAMPLES = range(4)


@dataclass(frozen=True)
class Order:
    """The order of a run.

    counts: samples of each shard, in index order; a sample's id is its row in the index.
    window: shards permuted together; 0 = the whole stream, a full permutation of it.
    Raises ValueError where the numbers do not fit together.
    """

    counts: tuple[int, ...]
    seed: int
    streams: int
    lanes: int
    micro_batch: int
    window: int = 0

    def __post_init__(self) -> None:
        if min(self.streams, self.lanes, self.micro_batch) < 1 or self.window < 0:
            raise ValueError("streams, lanes and micro_batch must be at least 1, window at least 0")
        if self.lanes % self.streams:
            raise ValueError(f"{self.streams} streams do not divide {self.lanes} lanes")
        if self.samples // self.streams < self.stream_batch:
            need = self.stream_batch * self.streams
            raise ValueError(f"one step takes {need} samples, there are {self.samples}")

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return sum(self.counts)

    @property
    def stream_batch(self) -> int:
        """Samples that one stream gives to one step."""
        return self.lanes // self.streams * self.micro_batch

    @property
    def steps_per_epoch(self) -> int:
        """Full steps that the shortest stream holds."""
        return self.samples // self.streams // self.stream_batch

    @property
    def left_out(self) -> int:
        """Samples of an epoch that fill no step; others each time."""
        return self.samples - self.steps_per_epoch * self.lanes * self.micro_batch

    def stream_of(self, lane: int) -> int:
        """Lanes of one stream are neighbours."""
        return lane // (self.lanes // self.streams)

    def ids(self, epoch: int, step: int, lanes: Sequence[int]) -> Ids:
        """Sample ids of one step, int64 [len(lanes), micro_batch]; touches the streams of these lanes alone."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is not in 0..{self.steps_per_epoch - 1}")
        rows = [self._lane(epoch, step, lane) for lane in lanes]
        return np.stack(rows) if rows else np.empty((0, self.micro_batch), np.int64)

    def _lane(self, epoch: int, step: int, lane: int) -> Ids:
        each = self.lanes // self.streams
        begin = (step * each + lane % each) * self.micro_batch
        return self.stream(epoch, self.stream_of(lane))[begin : begin + self.micro_batch]

    def stream(self, epoch: int, stream: int) -> Ids:
        """All sample ids of one stream in this epoch's order, int64 [about samples / streams]."""
        return _stream(self, epoch, stream)

    @cached_property
    def pieces(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each stream its pieces of shards as (first id, end id); a shard that a cut meets is in two streams."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        laid = _permutation(len(self.counts), self.seed, CUT)
        ends = np.cumsum(np.array(self.counts, np.int64)[laid])
        cuts = [round(i * self.samples / self.streams) for i in range(self.streams + 1)]
        return tuple(tuple(_between(laid, ends, starts, a, b)) for a, b in itertools.pairwise(cuts))

    def __hash__(self) -> int:
        return hash((self.counts, self.seed, self.streams, self.lanes, self.micro_batch, self.window))


def _between(laid: Ids, ends: Ids, starts: Ids, low: int, high: int) -> list[tuple[int, int]]:
    """The pieces of the shards `laid` end to end that lie in [low, high)."""
    pieces = []
    for shard, end in zip(laid.tolist(), ends.tolist(), strict=True):
        begin = end - int(starts[shard + 1] - starts[shard])
        a, b = max(low, begin), min(high, end)
        if a < b:
            pieces.append((int(starts[shard]) + a - begin, int(starts[shard]) + b - begin))
    return pieces


@lru_cache(maxsize=64)
def _stream(order: Order, epoch: int, stream: int) -> Ids:
    pieces = order.pieces[stream]
    shuffled = _permutation(len(pieces), order.seed, SHARDS, epoch, stream)
    groups = enumerate(_groups(order, epoch, stream, shuffled))
    ids = np.concatenate([_window(order, epoch, stream, w, [pieces[i] for i in group]) for w, group in groups])
    ids.setflags(write=False)  # it is shared
    return ids


def _groups(order: Order, epoch: int, stream: int, shuffled: Ids) -> list[Ids]:
    """Windows of shards; the first is shorter, so that not all streams change windows at one step."""
    size = order.window or len(shuffled)
    if size >= len(shuffled):
        return [shuffled]
    first = 1 + int(_philox(order.seed, OFFSET, epoch, stream).random_raw() % size)
    return [shuffled[:first], *np.split(shuffled[first:], range(size, len(shuffled) - first, size))]


def _window(order: Order, epoch: int, stream: int, window: int, pieces: list[tuple[int, int]]) -> Ids:
    ids = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in pieces])
    return ids[_permutation(len(ids), order.seed, SAMPLES, epoch, stream, window)]


def _permutation(n: int, seed: int, purpose: int, *place: int) -> Ids:
    """A permutation of 0..n-1: the order of n raw 64-bit numbers, so that it is the same in every version of NumPy."""
    return np.argsort(_philox(seed, purpose, *place).random_raw(n), kind="stable")


def _philox(seed: int, purpose: int, epoch: int = 0, stream: int = 0, window: int = 0) -> np.random.Philox:
    """A counter-based generator of its own for each use: nothing depends on what was drawn before."""
    return np.random.Philox(key=[seed, purpose], counter=[0, epoch, stream, window])
