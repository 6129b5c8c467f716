"""The door to DALI: EncodedBatch + Geometry -> uint8 images, on a GPU or on a CPU.

    GPU: bytes -> decode the window -> resize -> crop -> mirror    one graph, all of it in DALI
         bytes -> decode -> crop, zeros outside -> mirror          where crops may leave the image; nothing is resized
    CPU: bytes -> decode the window in DALI -> resample.py         DALI's resize is slow there, and up to 14 of 255 off

Windows are inputs, so pixels depend neither on the place in the batch nor on the number of threads. What decides pixels
was chosen against torchvision: antialiased linear, no EXIF rotation, no fast IDCT. Evaluation is within 1 of 255 of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from pipelines.augment import Geometry
from pipelines.errors import ConfigError
from pipelines.reader import EncodedBatch
from pipelines.resample import Resampler

Where = Literal["gpu", "cpu"]


class Refused(Exception):
    """DALI could not decode a batch: at least one of its images is bad. It does not say reliably which one."""


def resolve_decode(wanted: Literal["auto", "gpu", "cpu"], gpu_present: bool) -> Where:
    """Where JPEGs are decoded. Raises ConfigError for a GPU that is not there."""
    if wanted == "gpu" and not gpu_present:
        raise ConfigError("data.decode is gpu, but this worker has no GPU; use auto or cpu")
    return "gpu" if wanted == "gpu" or (wanted == "auto" and gpu_present) else "cpu"


class Decoder:
    """Decodes batches of up to `batch_size` images to size x size; belongs to the thread that makes it.

    device_id: the GPU that will get the pixels, None without one. threads: CPU threads.
    hardware_load: share of a batch for a GPU's JPEG engine.
    exact: on a CPU, resize in float32, for evaluation (resample.py).
    reaches_outside: on a GPU, crops may leave the image, which is zeros there; then nothing is resized. On a CPU any
    crop may.
    """

    def __init__(
        self,
        size: int,
        decode: Where,
        device_id: int | None,
        threads: int,
        batch_size: int,
        hardware_load: float = 0.65,
        *,
        exact: bool = False,
        reaches_outside: bool = False,
    ) -> None:
        self._size, self._reaches_outside = size, reaches_outside
        self._resampler: Resampler | None = None  # on a GPU DALI does it all
        graph = partial(_padded_crop if reaches_outside else _resized_crop, size, hardware_load)
        if decode == "cpu":
            self._resampler = Resampler(size, threads, exact=exact, pin_memory=device_id is not None)
            graph = partial(_decoded, "cpu")
        self._build = partial(_pipeline, graph, batch_size, threads, device_id if decode == "gpu" else None)
        self._pipe: Any = self._build()

    def decode(self, batch: EncodedBatch, geometry: Geometry) -> torch.Tensor:
        """uint8 [n, size, size, 3], n = len(batch). Raises Refused; the next batch is right again."""
        if self._resampler:
            return self._resampler(self.windows(batch, geometry), geometry)
        images: torch.Tensor = from_dlpack(self._run(batch, geometry).as_tensor())
        return images

    def windows(self, batch: EncodedBatch, geometry: Geometry) -> list[torch.Tensor]:
        """On a CPU: uint8 [height, width, 3] of each window as it lies in its image, before resampling. See decode."""
        output = self._run(batch, geometry)
        return [from_dlpack(output[i]) for i in range(len(batch))]

    def _run(self, batch: EncodedBatch, geometry: Geometry) -> Any:
        self._feed(batch, geometry)
        try:
            (output,) = self._pipe.run()
        except RuntimeError as error:
            self._pipe = self._build()  # a failed pipeline may be invalid, says DALI; a new one takes some milliseconds
            raise Refused(_reason(error)) from error
        return output

    def close(self) -> None:
        """Ends the threads."""
        self._pipe = None
        if self._resampler:
            self._resampler.close()

    def _feed(self, batch: EncodedBatch, geometry: Geometry) -> None:
        feed = self._pipe.feed_input
        feed("jpegs", batch.images())
        feed("anchor", np.ascontiguousarray(geometry.window[:, :2]))
        feed("shape", np.ascontiguousarray(geometry.window[:, 2:]))
        if self._resampler:
            return
        feed("mirror", geometry.flip)
        if self._reaches_outside:
            feed("crop", geometry.crop)
            return
        room = np.maximum(geometry.resize - self._size, 1)  # DALI's crop position is a share of the room there is
        position = (geometry.crop / room).astype(np.float32)
        feed("resize", geometry.resize.astype(np.float32))
        feed("crop_y", np.ascontiguousarray(position[:, 0]))
        feed("crop_x", np.ascontiguousarray(position[:, 1]))


def _pipeline(graph: Callable[[], Any], batch_size: int, threads: int, device_id: int | None) -> Any:
    """Depth 1: a batch goes in and comes out, so that one that is refused can be replayed.

    The producer thread keeps the next batches ready; deeper pipes would only hide the same wait.
    """
    from nvidia.dali import Pipeline

    pipe = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipe:
        pipe.set_outputs(graph())
    pipe.build()
    return pipe


def _decoded(device: Literal["cpu", "mixed"], **options: Any) -> Any:
    """The windows of the images; the same on either device."""
    from nvidia.dali import fn, types

    return fn.decoders.image_slice(
        _given("jpegs", types.UINT8, 1),
        _given("anchor", types.INT32, 1),
        _given("shape", types.INT32, 1),
        device=device,
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        output_type=types.RGB,
        adjust_orientation=False,
        **options,
    )


def _resized_crop(size: int, hardware_load: float) -> Any:
    """On a GPU, in one operator."""
    from nvidia.dali import fn, types

    return fn.resize_crop_mirror(
        _decoded("mixed", hw_decoder_load=hardware_load),
        size=_given("resize", types.FLOAT, 1),
        crop=(size, size),
        crop_pos_y=_given("crop_y", types.FLOAT, 0),
        crop_pos_x=_given("crop_x", types.FLOAT, 0),
        mirror=_given("mirror", types.INT32, 0),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def _padded_crop(size: int, hardware_load: float) -> Any:
    """On a GPU: zeros outside the image."""
    from nvidia.dali import fn, types

    images = _decoded("mixed", hw_decoder_load=hardware_load)
    place = {"start": _given("crop", types.INT32, 1), "shape": (size, size), "axis_names": "HW"}
    images = fn.slice(images, **place, out_of_bounds_policy="pad", fill_values=0)
    return fn.flip(images, horizontal=_given("mirror", types.INT32, 0))


def _given(name: str, dtype: Any, ndim: int) -> Any:
    from nvidia.dali import fn

    return fn.external_source(name=name, dtype=dtype, ndim=ndim, no_copy=True)


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if "decode" in line.lower() or "nvimagecodec" in line.lower()]
    return (telling or lines)[-1][:160]
