"""What the loop sees: batches of uint8 images on the device, made ahead of it.

order -> ids -> Reader -> EncodedBatch -> Decoding -> Batch
(a thread that reads one batch ahead)     (a thread that owns the DALI pipeline)
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment import Augment, Geometry, eval_geometry, train_geometry
from pipelines.dali import Decoder, Where
from pipelines.decoding import Decoding, GeometryOf, StandIns
from pipelines.delivery import Delivery
from pipelines.digest import digest
from pipelines.order import Order
from pipelines.producer import Producer
from pipelines.quarantine import BadSample, Quarantine, nearest
from pipelines.reader import EncodedBatch, Reader

READ_AHEAD = 1  # encoded batches that wait for the decoder
NEIGHBOURS = 32  # samples on either side that may stand in for a bad one in evaluation


@dataclass
class Batch:
    """Images of one step on this rank, lane after lane."""

    images: torch.Tensor  # uint8 [n, size, size, 3] on the device
    labels: torch.Tensor  # int64 [n] on the device
    ids: NDArray[np.int64]  # [n] sample ids that were fed
    epoch: int
    step: int
    digest: int  # 0 .. 2**64 - 1; sums over ranks and steps
    bad: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class Ask:
    """A batch that is wanted, its bytes, and how to decode it."""

    epoch: int
    step: int
    slots: NDArray[np.int64]  # [n] places in the global batch, for the digest
    encoded: EncodedBatch
    geometry_of: GeometryOf
    stand_ins: StandIns


class Batches:
    """Iterates asks into batches, in a thread that ends with `close`. Iterating again begins anew."""

    def __init__(
        self,
        reader: Reader,
        quarantine: Quarantine,
        *,
        size: int,
        batch_size: int,
        device: torch.device,
        decode: Where,
        threads: int,
        prefetch: int,
        exact: bool = False,
        reaches_outside: bool = False,
    ) -> None:
        self._reader, self._quarantine, self._prefetch = reader, quarantine, prefetch
        self._delivery = Delivery(device)
        place = (decode, self._delivery.device_id, threads, batch_size)
        self._decoder = partial(Decoder, size, *place, exact=exact, reaches_outside=reaches_outside)
        self._producer: Producer[Batch] | None = None

    def asks(self) -> Generator[Ask, None, None]:
        """Read in the reading thread."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._producer = Producer(self._produce, self._prefetch, "skiplane-decode")
        yield from self._producer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves no thread behind; may be called twice."""
        if self._producer:
            self._producer.close()

    def _produce(self) -> Generator[Batch, None, None]:
        with (
            closing(self._decoder()) as decoder,
            self._delivery.stream(),
            Producer(self.asks, READ_AHEAD, "skiplane-ahead") as ahead,
        ):
            decoding = Decoding(decoder, self._reader, self._quarantine)
            for ask in ahead:
                images, fed, bad = decoding.decode(ask.encoded, ask.geometry_of, ask.stand_ins)
                value = digest(ask.epoch, ask.step, ask.slots, fed.ids, fed.crc32)
                images, labels = self._delivery(images, torch.from_numpy(fed.labels.astype(np.int64)))
                yield Batch(images, labels, fed.ids, ask.epoch, ask.step, value, bad)


class TrainBatches(Batches):
    """Training batches of this rank's lanes, from global step `start` to `stop`, over epochs without a seam.

    prefetch: finished batches that may wait. A bad image is replaced by the nearest good one of its own micro-batch.
    Raises ConfigError at once where an image is too small for its crops; DataError in the consumer: a shard that is
    missing or cut short, too many bad images.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        augment: Augment,
        *,
        lanes: Sequence[int],
        seed: int,
        start: int,
        stop: int,
        device: torch.device,
        decode: Where,
        threads: int,
        prefetch: int,
        quarantine: Quarantine,
    ) -> None:
        augment.check(reader.smallest_side)
        super().__init__(
            reader,
            quarantine,
            size=augment.size,
            batch_size=len(lanes) * order.micro_batch,
            device=device,
            decode=decode,
            threads=threads,
            prefetch=prefetch,
            reaches_outside=augment.reaches_outside,
        )
        self._order, self._augment, self._lanes, self._seed = order, augment, lanes, seed
        self._steps = range(start, stop)
        self._slots = (np.array(lanes)[:, None] * order.micro_batch + np.arange(order.micro_batch)).ravel()

    def asks(self) -> Generator[Ask, None, None]:
        """One a step."""
        for global_step in self._steps:
            epoch, step = divmod(global_step, self._order.steps_per_epoch)
            ids = self._order.ids(epoch, step, self._lanes)  # [lanes, micro_batch]
            encoded = self._reader.read(ids.ravel(), self._delivery.slab)
            yield Ask(epoch, step, self._slots, encoded, partial(self._geometry, epoch), partial(lane_mates, ids))

    def _geometry(self, epoch: int, encoded: EncodedBatch) -> Geometry:
        return train_geometry(self._augment, self._seed, epoch, encoded.ids, encoded.sizes)


class EvalBatches(Batches):
    """The given ids, each exactly once, in order; the last batch may be short.

    A bad image is replaced by the good one with the nearest id, and the digest's slot is the id: so neither depends on
    the number of workers.
    """

    def __init__(
        self,
        reader: Reader,
        ids: Sequence[int],
        *,
        resize: int,
        size: int,
        batch_size: int,
        device: torch.device,
        decode: Where,
        threads: int,
        quarantine: Quarantine,
        prefetch: int = 2,
    ) -> None:
        super().__init__(
            reader,
            quarantine,
            size=size,
            batch_size=batch_size,
            device=device,
            decode=decode,
            threads=threads,
            prefetch=prefetch,
            exact=True,
        )
        self._ids, self._resize, self._size, self._batch_size = np.asarray(ids, np.int64), resize, size, batch_size

    def asks(self) -> Generator[Ask, None, None]:
        """One batch after the other; all are step 0, because a digest must not depend on who evaluates what."""
        for first in range(0, len(self._ids), self._batch_size):
            ids = self._ids[first : first + self._batch_size]
            encoded = self._reader.read(ids, self._delivery.slab)
            yield Ask(0, 0, ids, encoded, self._geometry, partial(neighbours, ids, self._reader.split.samples))

    def _geometry(self, encoded: EncodedBatch) -> Geometry:
        return eval_geometry(self._resize, self._size, encoded.sizes)


class SyntheticBatches:
    """The same surface without data: one random batch again and again. Ceiling of benchmarks, stand-in in tests."""

    def __init__(
        self,
        *,
        n: int,
        size: int,
        classes: int,
        start: int,
        stop: int,
        steps_per_epoch: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._images = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator).to(device)
        self._labels = torch.randint(0, classes, (n,), generator=generator).to(device)
        self._steps, self._steps_per_epoch = range(start, stop), steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        ids = np.arange(len(self._labels))
        for global_step in self._steps:
            epoch, step = divmod(global_step, self._steps_per_epoch)
            yield Batch(self._images, self._labels, ids, epoch, step, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        """Nothing runs."""


def lane_mates(ids: NDArray[np.int64], row: int) -> Iterator[int]:
    """The other ids of a row's micro-batch, the nearest place first. ids: [lanes, micro_batch]."""
    lane, place = divmod(row, ids.shape[1])
    return nearest(place, ids[lane].tolist())


def neighbours(ids: NDArray[np.int64], samples: int, row: int) -> Iterator[int]:
    """Ids near that of a row, the nearest first."""
    sample = int(ids[row])
    near = range(max(0, sample - NEIGHBOURS), min(samples, sample + NEIGHBOURS + 1))
    return nearest(sample - near.start, near)
