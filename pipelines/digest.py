"""The data digest: equal digests mean that equal bytes were fed at equal places, whoever fed them."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]


def digest(epoch: int, step: int, slots: ArrayLike, ids: ArrayLike, crcs: ArrayLike) -> int:
    """Sum of 64-bit hashes of (epoch, step, slot, sample id, crc32) modulo 2**64: no order, so ranks simply add.

    slot: the place in the *global* batch, lane * micro_batch + i. All arrays: [n].
    """
    parts = np.broadcast_arrays(*(np.asarray(v).astype(np.uint64) for v in (epoch, step, slots, ids, crcs)))
    state = np.zeros(parts[0].shape, np.uint64)
    for part in parts:
        state = _mix(state ^ part)
    return int(state.sum(dtype=np.uint64))


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64 (Steele et al. 2014), after its increment."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
