"""Which shards a node needs, and when: the future is known, because the order is a pure function. Arithmetic only."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.order import Order, Window

AHEAD = 64  # steps by which reading may run ahead of training; more than any prefetch


@dataclass(frozen=True)
class Need:
    """A shard, and the global steps [begin, end] between which its samples are read."""

    split: str
    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class Needs:
    """What a node that plays `lanes` needs, epoch after epoch.

    val: the shards that its evaluations read. evaluates: epoch -> whether it ends with an evaluation.
    """

    order: Order
    lanes: Sequence[int]
    val: Sequence[int] = ()
    evaluates: Callable[[int], bool] = lambda _: True
    epochs: int = 1
    _epochs: dict[int, tuple[Need, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def upcoming(self, step: int) -> list[Need]:
        """All needs of this epoch and the next one that are not over at global step `step`, the soonest first.

        Two epochs, because each epoch reads every shard of the node's streams: the next need of each is in there.
        """
        epoch = step // self.order.steps_per_epoch
        found = [need for e in (epoch - 1, epoch, epoch + 1) if 0 <= e < self.epochs for need in self._of(e)]
        return [need for need in found if need.end >= step]

    def _of(self, epoch: int) -> tuple[Need, ...]:
        if (kept := self._epochs.get(epoch)) is None:
            for old in [e for e in list(self._epochs) if abs(e - epoch) > 2]:  # threads share it
                self._epochs.pop(old, None)
            found = tuple(sorted(self._train(epoch), key=lambda n: n.begin)) + self._val(epoch)
            self._epochs[epoch] = found
            return found
        return kept

    def _streams(self) -> list[int]:
        return sorted({self.order.stream_of(lane) for lane in self.lanes})

    def _train(self, epoch: int) -> Iterator[Need]:
        first = epoch * self.order.steps_per_epoch
        for stream in self._streams():
            for window in self.order.windows(epoch, stream):
                begin, end = self._steps(window)
                if begin < self.order.steps_per_epoch:  # what is left out of this epoch is not read
                    for shard in sorted({self.order.shard_of(piece[0]) for piece in window.pieces}):
                        yield Need("train", shard, first + begin, first + end)

    def _steps(self, window: Window) -> tuple[int, int]:
        """The steps of an epoch that read from a window: [first, last]."""
        return window.begin // self.order.stream_batch, (window.end - 1) // self.order.stream_batch

    def _val(self, epoch: int) -> tuple[Need, ...]:
        """Read when the epoch's last step is done; training's reader is in the next epoch by then."""
        if not self.evaluates(epoch):
            return ()
        last = (epoch + 1) * self.order.steps_per_epoch - 1
        return tuple(Need("val", shard, last, last + AHEAD) for shard in self.val)


def shards_of(starts: Sequence[int], samples: range) -> range:
    """The shards that hold a range of sample ids. starts: the first id of each shard, and the number of all samples."""
    if not samples:
        return range(0)
    held = [i for i in range(len(starts) - 1) if starts[i] < samples.stop and starts[i + 1] > samples.start]
    return range(held[0], held[-1] + 1)


@dataclass(frozen=True)
class InOrder:
    """The needs of one pass over a split, in the order of its samples; a sample is a step."""

    split: str
    starts: Sequence[int]  # the first sample id of each shard, and the number of all samples

    def upcoming(self, step: int) -> list[Need]:
        """The shards from sample `step` on."""
        needs = [Need(self.split, i, a, b - 1) for i, (a, b) in enumerate(itertools.pairwise(self.starts))]
        return [need for need in needs if need.end >= step]
