"""Between host and device: the memory that encoded images are read into, and the way of decoded ones to the step."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from pipelines.reader import Slab


class Delivery:
    """Brings decoded images to the device, and makes the memory that encoded ones are read into.

    On a GPU the copy runs in a stream of its own, so that it does not wait for the step that is running there, and
    DALI gets its buffer back only when the copy is done: it knows nothing of the step that reads the images. Its price
    is one pass over the images in device memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self.device_id = (device.index or 0) if self._cuda else None
        self._consumer: Any = torch.cuda.current_stream(device) if self._cuda else None
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

    def slab(self, size: int) -> Slab:
        """Memory for encoded images, uint8 [size]; pinned where a GPU reads from it."""
        if not self._cuda:
            return np.empty(size, np.uint8)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    def stream(self) -> Any:
        """A context for the producing thread: what it copies, it copies beside the step."""
        return torch.cuda.stream(self._stream) if self._cuda else nullcontext()

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The tensors on the device, safe to use in the stream that was current when this was made."""
        if not self._cuda:
            return list(tensors)
        moved = [tensor.to(self._device, copy=True) for tensor in tensors]
        self._stream.synchronize()
        for tensor in moved:
            tensor.record_stream(self._consumer)
        return moved
