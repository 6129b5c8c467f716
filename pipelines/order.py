"""Which samples make up a step: arithmetic on integers, a pure function of (counts, seed, epoch, step).

The training split is cut once a run into S equal *streams*: the shards, permuted by the seed, laid end to end, cut at
sample granularity. Each epoch permutes the shards inside a stream, groups them into *windows* (the first one shorter,
by another amount in each stream, so that not all streams change windows at one step) and permutes the samples inside
each window. A step takes the next V/S x micro_batch ids of every stream; *lanes* are slices of that. What does not
fill a last step is left out of this epoch: other samples each time.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Piece = tuple[int, int]  # sample ids [first, end) of one shard
CUT, SHARDS, OFFSET, SAMPLES = range(4)  # what random numbers are for; part of their key, so that no two uses share any


@dataclass(frozen=True)
class Window:
    """Pieces of shards whose samples are permuted together; they are samples [begin, end) of a stream's epoch."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]


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
    # What the last calls asked for, by stream: (epoch, its windows), and (epoch, number, ids of one window).
    _windows: dict[int, tuple[int, tuple[Window, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _window_ids: dict[int, tuple[int, int, Ids]] = field(default_factory=dict, init=False, repr=False, compare=False)

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
    def starts(self) -> tuple[int, ...]:
        """The first sample id of each shard, and the number of all samples."""
        return (0, *itertools.accumulate(self.counts))

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For each stream the pieces of shards it is made of; a shard that a cut goes through is in two streams."""
        laid = _permutation(len(self.counts), self.seed, CUT).tolist()
        shards = [(self.starts[i], self.starts[i + 1]) for i in laid]
        ends = list(itertools.accumulate(end - first for first, end in shards))
        cuts = [round(i * self.samples / self.streams) for i in range(self.streams + 1)]
        return tuple(_between(shards, ends, low, high) for low, high in itertools.pairwise(cuts))

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect_right(self.starts, sample) - 1

    def stream_of(self, lane: int) -> int:
        """The stream that a lane reads from: the lanes of a stream are neighbours."""
        return lane // self.lanes_per_stream

    def ids(self, epoch: int, step: int, lanes: Sequence[int]) -> Ids:
        """Sample ids of one step, int64 [len(lanes), micro_batch].

        Only the windows that these lanes are in are computed: a position costs the same wherever it is.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is not in 0..{self.steps_per_epoch - 1}")
        rows = np.empty((len(lanes), self.micro_batch), np.int64)
        for row, lane in zip(rows, lanes, strict=True):
            stream, place = divmod(lane, self.lanes_per_stream)
            begin = (step * self.lanes_per_stream + place) * self.micro_batch
            row[:] = self._slice(epoch, stream, begin, begin + self.micro_batch)
        return rows

    def stream(self, epoch: int, stream: int) -> Ids:
        """All ids of a stream in the order of this epoch, int64 [samples / streams, give or take one]."""
        return self._slice(epoch, stream, 0, self.windows(epoch, stream)[-1].end)

    def windows(self, epoch: int, stream: int) -> tuple[Window, ...]:
        """The windows of a stream in the order of this epoch."""
        kept = self._windows.get(stream)
        if kept is None or kept[0] != epoch:
            kept = self._windows[stream] = (epoch, self._grouped(epoch, stream))
        return kept[1]

    def _slice(self, epoch: int, stream: int, begin: int, end: int) -> Ids:
        """Ids [begin, end) of a stream's epoch, from the windows that overlap them."""
        windows = self.windows(epoch, stream)
        number = bisect_right(windows, begin, key=lambda window: window.begin) - 1
        parts = []
        while begin < end:
            window = windows[number]
            stop = min(end, window.end)
            parts.append(self._permuted(epoch, stream, number)[begin - window.begin : stop - window.begin])
            begin, number = stop, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _permuted(self, epoch: int, stream: int, number: int) -> Ids:
        kept = self._window_ids.get(stream)
        if kept is None or kept[:2] != (epoch, number):
            pieces = self.windows(epoch, stream)[number].pieces
            ids = np.concatenate([np.arange(*piece, dtype=np.int64) for piece in pieces])
            ids = ids[_permutation(len(ids), self.seed, SAMPLES, epoch, stream, number)]
            kept = self._window_ids[stream] = (epoch, number, ids)
        return kept[2]

    def _grouped(self, epoch: int, stream: int) -> tuple[Window, ...]:
        """The stream's pieces, permuted for this epoch and cut into windows."""
        pieces = self.pieces[stream]
        shuffled = _permutation(len(pieces), self.seed, SHARDS, epoch, stream).tolist()
        windows, begin = [], 0
        for members in _cut(shuffled, self.window, int(_philox(self.seed, OFFSET, epoch, stream).random_raw())):
            chosen = tuple(pieces[i] for i in members)
            end = begin + sum(last - first for first, last in chosen)
            windows.append(Window(begin, end, chosen))
            begin = end
        return tuple(windows)


def _cut(pieces: list[int], window: int, drawn: int) -> list[list[int]]:
    """Groups of `window`, the first one of 1 + drawn % window."""
    if not window or window >= len(pieces):
        return [pieces]
    cuts = [0, *range(1 + drawn % window, len(pieces), window), len(pieces)]
    return [pieces[a:b] for a, b in itertools.pairwise(cuts)]


def _between(shards: list[Piece], ends: list[int], low: int, high: int) -> tuple[Piece, ...]:
    """What lies in [low, high) of the shards laid end to end; `ends`: where each ends there."""
    pieces, i = [], bisect_right(ends, low)
    while i < len(shards) and ends[i] - (shards[i][1] - shards[i][0]) < high:
        (first, end), at = shards[i], ends[i] - (shards[i][1] - shards[i][0])
        a, b = max(first, first + low - at), min(end, first + high - at)
        if a < b:
            pieces.append((a, b))
        i += 1
    return tuple(pieces)


def _permutation(n: int, seed: int, purpose: int, epoch: int = 0, stream: int = 0, window: int = 0) -> Ids:
    """A permutation of 0..n-1 by sorting raw random numbers.

    NumPy keeps the raw stream of a bit generator for ever, its `permutation` only within a release (NEP 19).
    """
    return np.argsort(_philox(seed, purpose, epoch, stream, window).random_raw(n), kind="stable")


def _philox(seed: int, purpose: int, epoch: int = 0, stream: int = 0, window: int = 0) -> np.random.Philox:
    """A counter-based generator for each use: nothing depends on what was drawn before."""
    return np.random.Philox(key=[seed, purpose], counter=[0, epoch, stream, window])
