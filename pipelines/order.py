"""Which samples make up a step: arithmetic on integers, a pure function of (counts, seed, epoch, step).

The training split is cut once a run into S equal *streams*: the shards, permuted by the seed, laid end to end, cut at
sample granularity. Each epoch permutes the shards inside a stream, groups them into *windows* (the first one shorter,
by another amount in each stream, so that not all streams change windows at one step) and permutes the samples inside
each window. A step takes the next V/S x micro_batch ids of every stream; *lanes* are slices of that. What does not
fill a last step is left out of this epoch: other samples each time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Piece = tuple[int, int]  # sample ids [first, end) of one shard
CUT, SHARDS, OFFSET, SAMPLES = range(4)  # what random numbers are for; part of their key, so that no two uses share any


@dataclass(frozen=True)
class Order:
    """The order of a run.

    counts: samples of each shard in the index's order; a sample's id is its row in the index.
    streams, lanes: S and V; S divides V. micro_batch: samples of a lane in a step.
    window: shards that are permuted together; 0 = the whole stream, a full permutation of it.
    Raises ValueError where the numbers do not fit together.
    """

    counts: tuple[int, ...]
    seed: int
    streams: int
    lanes: int
    micro_batch: int
    window: int = 0
    # The permuted ids of the last epoch asked for, by stream: (epoch, ids). ImageNet in 8 streams: 1.3 MB each.
    _memory: dict[int, tuple[int, Ids]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.streams, self.lanes, self.micro_batch) < 1 or self.window < 0:
            raise ValueError("streams, lanes and micro_batch must be at least 1, window at least 0")
        if self.lanes % self.streams:
            raise ValueError(f"{self.streams} streams do not divide {self.lanes} lanes")
        if not self.steps_per_epoch:
            raise ValueError(
                f"one step takes {self.stream_batch} samples of each of {self.streams} streams, "
                f"the shortest holds {self.samples // self.streams}"
            )

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return sum(self.counts)

    @property
    def lanes_per_stream(self) -> int:
        return self.lanes // self.streams

    @property
    def stream_batch(self) -> int:
        """Samples that a stream gives to a step."""
        return self.lanes_per_stream * self.micro_batch

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in the shortest stream, which holds samples // streams."""
        return self.samples // self.streams // self.stream_batch

    @property
    def left_out(self) -> int:
        """Samples that an epoch does not show."""
        return self.samples - self.steps_per_epoch * self.lanes * self.micro_batch

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For each stream the pieces of shards it is made of; a shard that a cut goes through is in two streams."""
        starts = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)]).tolist()
        laid = _permutation(len(self.counts), self.seed, CUT)
        shards = [(starts[i], starts[i + 1]) for i in laid.tolist()]
        cuts = [round(i * self.samples / self.streams) for i in range(self.streams + 1)]
        return tuple(_between(shards, low, high) for low, high in itertools.pairwise(cuts))

    def ids(self, epoch: int, step: int, lanes: Sequence[int]) -> Ids:
        """Sample ids of one step, int64 [len(lanes), micro_batch]. Only the streams of these lanes are computed."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is not in 0..{self.steps_per_epoch - 1}")
        rows = np.empty((len(lanes), self.micro_batch), np.int64)
        for row, lane in zip(rows, lanes, strict=True):
            stream, place = divmod(lane, self.lanes_per_stream)  # the lanes of a stream are neighbours
            begin = (step * self.lanes_per_stream + place) * self.micro_batch
            row[:] = self.stream(epoch, stream)[begin : begin + self.micro_batch]
        return rows

    def stream(self, epoch: int, stream: int) -> Ids:
        """All ids of a stream in the order of this epoch, int64 [samples / streams, give or take one]."""
        kept = self._memory.get(stream)
        if kept is None or kept[0] != epoch:
            kept = self._memory[stream] = (epoch, self._permuted(epoch, stream))
        return kept[1]

    def _permuted(self, epoch: int, stream: int) -> Ids:
        pieces = self.pieces[stream]
        shuffled = _permutation(len(pieces), self.seed, SHARDS, epoch, stream)
        windows = []
        for number, members in enumerate(self._windows(epoch, stream, shuffled)):
            ids = np.concatenate([np.arange(*pieces[i], dtype=np.int64) for i in members])
            windows.append(ids[_permutation(len(ids), self.seed, SAMPLES, epoch, stream, number)])
        return np.concatenate(windows)

    def _windows(self, epoch: int, stream: int, shuffled: Ids) -> list[Ids]:
        if not self.window or self.window >= len(shuffled):
            return [shuffled]
        drawn = int(_philox(self.seed, OFFSET, epoch, stream).random_raw())
        return np.split(shuffled, range(1 + drawn % self.window, len(shuffled), self.window))


def _between(shards: list[Piece], low: int, high: int) -> tuple[Piece, ...]:
    """What lies in [low, high) of the shards laid end to end."""
    pieces, at = [], 0
    for first, end in shards:
        a, b = max(first, first + low - at), min(end, first + high - at)
        if a < b:
            pieces.append((a, b))
        at += end - first
    return tuple(pieces)


def _permutation(n: int, seed: int, purpose: int, epoch: int = 0, stream: int = 0, window: int = 0) -> Ids:
    """A permutation of 0..n-1 by sorting raw random numbers.

    NumPy keeps the raw stream of a bit generator for ever, its `permutation` only within a release (NEP 19).
    """
    return np.argsort(_philox(seed, purpose, epoch, stream, window).random_raw(n), kind="stable")


def _philox(seed: int, purpose: int, epoch: int = 0, stream: int = 0, window: int = 0) -> np.random.Philox:
    """A counter-based generator for each use: nothing depends on what was drawn before."""
    return np.random.Philox(key=[seed, purpose], counter=[0, epoch, stream, window])
