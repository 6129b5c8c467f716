"""Decoding that does not fall over a bad image: it is named and replaced, the others are as they would have been."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from pipelines.augment import Geometry
from pipelines.dali import Decoder, Refused
from pipelines.errors import DataError
from pipelines.quarantine import CHECKSUM, BadSample, Quarantine
from pipelines.reader import EncodedBatch, Reader, joined

GeometryOf = Callable[[EncodedBatch], Geometry]
StandIns = Callable[[int], Iterable[int]]  # row of a batch -> ids that may take its place, the best first


class Decoding:
    """A decoder, and what to do when it refuses. Belongs to the decoder's thread."""

    def __init__(self, decoder: Decoder, reader: Reader, quarantine: Quarantine) -> None:
        self._decoder, self._reader, self._quarantine = decoder, reader, quarantine

    def decode(
        self, encoded: EncodedBatch, geometry_of: GeometryOf, stand_ins: StandIns
    ) -> tuple[torch.Tensor, EncodedBatch, tuple[BadSample, ...]]:
        """(images uint8 [n, S, S, 3], the batch that was really fed, what was bad).

        Raises DataError past the quarantine's limit, and where no stand-in is good.
        """
        if encoded.intact.all():
            try:
                return self._decoder.decode(encoded, geometry_of(encoded)), encoded, ()
            except Refused:
                pass  # as a whole, and without a reliable name: each image is tried alone, from the slab
        fed, bad = self._mend(encoded, geometry_of, stand_ins)
        return self._decoder.decode(fed, geometry_of(fed)), fed, bad

    def _mend(
        self, encoded: EncodedBatch, geometry_of: GeometryOf, stand_ins: StandIns
    ) -> tuple[EncodedBatch, tuple[BadSample, ...]]:
        singles, bad = [], []
        for row in range(len(encoded)):
            single = encoded.row(row)
            if reason := self._fault(single, geometry_of):
                single = self._stand_in(single, reason, geometry_of, stand_ins(row))
                bad.append(self._name(int(encoded.ids[row]), reason, int(single.ids[0])))
            singles.append(single)
        return joined(singles), tuple(bad)

    def _fault(self, single: EncodedBatch, geometry_of: GeometryOf) -> str:
        """Why an image cannot be fed; empty where it can."""
        if not single.intact.all():
            return CHECKSUM
        try:
            self._decoder.decode(single, geometry_of(single))
        except Refused as refused:
            return str(refused)
        return ""

    def _stand_in(
        self, single: EncodedBatch, reason: str, geometry_of: GeometryOf, candidates: Iterable[int]
    ) -> EncodedBatch:
        for candidate in candidates:
            other = self._reader.read(np.array([candidate]))
            if not self._fault(other, geometry_of):
                return other
        shard, key = self._reader.name(int(single.ids[0]))
        raise DataError(f"{key} in {shard} cannot be used ({reason}), nor can any image that may stand in for it")

    def _name(self, sample: int, reason: str, replaced_by: int) -> BadSample:
        bad = BadSample(sample, *self._reader.name(sample), reason, replaced_by)
        self._quarantine.add(bad)
        return bad
