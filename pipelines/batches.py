"""What the loop sees: batches of uint8 images on the device, made ahead by one thread that owns the DALI pipeline.

    order -> reader -> EncodedBatch -> DALI -> Batch

The thread is a producer, not the training thread; the seam between reading and decoding is EncodedBatch.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment import Augment, Geometry, eval_geometry, train_geometry
from pipelines.dali import Decoder, Refused, Where
from pipelines.digest import digest
from pipelines.order import Order
from pipelines.quarantine import BadSample, Quarantine, replacements
from pipelines.reader import EncodedBatch, Reader


@dataclass(frozen=True)
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
    """A batch that is wanted: which samples, cropped how, for which slots of the global batch."""

    epoch: int
    step: int
    ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    encoded: EncodedBatch
    geometry: Geometry


class Workshop:
    """Turns asks into batches; lives in the producer thread. A refused batch is replayed image by image."""

    def __init__(
        self,
        size: int,
        decode: Where,
        device: torch.device,
        threads: int,
        batch_size: int,
        micro_batch: int,
        reader: Reader,
        quarantine: Quarantine,
    ) -> None:
        self._device_id = device.index or 0 if device.type == "cuda" else None
        self._device, self._micro_batch, self._reader, self._quarantine = device, micro_batch, reader, quarantine
        self._settings = (size, decode, self._device_id, threads)
        self._decoder = Decoder(*self._settings, batch_size)
        self._single: Decoder | None = None

    def make(self, ask: Ask) -> Batch:
        """Raises DataError where too many images are bad."""
        reasons = {int(i): "its bytes do not match their checksum" for i in np.flatnonzero(~ask.encoded.intact)}
        try:
            fed = self._without(ask, reasons)
            images = self._decoder.decode(fed.encoded, fed.geometry)
        except Refused:
            reasons |= self._refused(ask, reasons)
            fed = self._without(ask, reasons)
            images = self._decoder.decode(fed.encoded, fed.geometry)
        encoded = fed.encoded
        value = digest(ask.epoch, ask.step, ask.slots, encoded.ids, encoded.crc32)
        labels = torch.from_numpy(encoded.labels.astype(np.int64)).to(self._device)
        return Batch(images, labels, encoded.ids, ask.epoch, ask.step, value, self._name(ask, fed, reasons))

    def _without(self, ask: Ask, reasons: dict[int, str]) -> Ask:
        """The ask with each bad image replaced by its neighbour, cropped as the neighbour is."""
        if not reasons:
            return ask
        rows = replacements([i not in reasons for i in range(len(ask.ids))], self._micro_batch)
        return replace(ask, encoded=ask.encoded.take(rows), geometry=ask.geometry.take(rows))

    def _refused(self, ask: Ask, known: dict[int, str]) -> dict[int, str]:
        """Which images DALI refuses alone, and what it says."""
        self._single = self._single or Decoder(*self._settings, 1)
        reasons = {}
        for i in range(len(ask.ids)):
            if i not in known:
                try:
                    self._single.decode(ask.encoded.take([i]), ask.geometry.take([i]))
                except Refused as refused:
                    reasons[i] = str(refused)
        return reasons

    def _name(self, ask: Ask, fed: Ask, reasons: dict[int, str]) -> tuple[BadSample, ...]:
        bad = tuple(
            BadSample(int(ask.ids[i]), *self._reader.name(int(ask.ids[i])), reason, int(fed.encoded.ids[i]))
            for i, reason in sorted(reasons.items())
        )
        self._quarantine.admit(bad)
        return bad


class Producer:
    """Runs an iterator of batches in a thread of its own, `depth` ahead. An exception there is raised here."""

    def __init__(self, source: "_Source", depth: int) -> None:
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(source,), name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Ends the thread; what it had made is dropped."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)  # a producer that waits for room sees that it is closed
            except queue.Empty:
                continue

    def _run(self, source: "_Source") -> None:
        try:
            for batch in source.produce():
                if self._closed.is_set():
                    return
                self._queue.put(batch)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)


class _Source:
    """What both kinds of batches share: a producer while they are iterated, and its end."""

    def __init__(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._producer: Producer | None = None

    def produce(self) -> Iterator[Batch]:
        """In the producer thread."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._producer = Producer(self, self._prefetch)
        yield from self._producer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves no thread behind."""
        if self._producer:
            self._producer.close()
            self._producer = None


class TrainBatches(_Source):
    """Training batches of this rank's lanes, from global step `start` to `stop`, over epochs without a seam."""

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
        super().__init__(prefetch)
        self._reader, self._order, self._augment, self._lanes, self._seed = reader, order, augment, lanes, seed
        self._steps = range(start, stop)
        self._workshop = (
            augment.size,
            decode,
            device,
            threads,
            len(lanes) * order.micro_batch,
            order.micro_batch,
            reader,
            quarantine,
        )
        places = np.arange(order.micro_batch)
        self._slots = np.concatenate([lane * order.micro_batch + places for lane in lanes])

    def produce(self) -> Iterator[Batch]:
        """One batch a step."""
        workshop = Workshop(*self._workshop)
        for global_step in self._steps:
            yield workshop.make(self._ask(*divmod(global_step, self._order.steps_per_epoch)))

    def _ask(self, epoch: int, step: int) -> Ask:
        ids = self._order.ids(epoch, step, self._lanes).reshape(-1)
        encoded = self._reader.read(ids)
        geometry = train_geometry(self._augment, self._seed, epoch, ids, encoded.sizes)
        return Ask(epoch, step, ids, self._slots, encoded, geometry)


class EvalBatches(_Source):
    """The given ids, each exactly once, in batches; the last one may be short."""

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
        super().__init__(prefetch)
        self._reader, self._ids, self._resize, self._size, self._batch_size = (
            reader,
            np.asarray(ids, np.int64),
            resize,
            size,
            batch_size,
        )
        self._workshop = (size, decode, device, threads, batch_size, batch_size, reader, quarantine)

    def produce(self) -> Iterator[Batch]:
        """One batch after the other; the digest's slot is the sample id itself, so that any split adds up the same."""
        workshop = Workshop(*self._workshop)
        for step, first in enumerate(range(0, len(self._ids), self._batch_size)):
            ids = self._ids[first : first + self._batch_size]
            encoded = self._reader.read(ids)
            geometry = eval_geometry(self._resize, self._size, encoded.sizes)
            yield replace(workshop.make(Ask(0, 0, ids, ids, encoded, geometry)), step=step)


class SyntheticBatches:
    """The same surface without data: one random batch again and again. A ceiling for benchmarks, a stand-in for tests."""

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
