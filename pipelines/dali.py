"""The door to DALI: EncodedBatch + Geometry -> uint8 images, on the GPU or the CPU with the same graph.

    bytes -> decode the window -> resize -> crop -> mirror -> uint8 NHWC
    bytes -> decode            -> crop, zeros outside -> mirror -> uint8 NHWC    where crops may leave the image

Crops are inputs, so pixels depend neither on the place in the batch nor on the number of threads. Settings that decide
pixels were chosen against torchvision: antialiased linear, no EXIF rotation, no fast IDCT; within 1 of 255 of it.
"""

from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from pipelines.augment import Geometry
from pipelines.errors import ConfigError
from pipelines.reader import EncodedBatch

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

    device_id: the GPU that gets the pixels, None on a CPU. hardware_load: share of a batch for a GPU's JPEG engine.
    reaches_outside: crops may leave the image, which is zeros there; then nothing is resized.
    """

    def __init__(
        self,
        size: int,
        decode: Where,
        device_id: int | None,
        threads: int,
        batch_size: int,
        hardware_load: float = 0.65,
        reaches_outside: bool = False,
    ) -> None:
        self._size, self._reaches_outside = size, reaches_outside
        self._build = partial(_build, size, decode, device_id, threads, batch_size, hardware_load, reaches_outside)
        self._pipe: Any = self._build()

    def decode(self, batch: EncodedBatch, geometry: Geometry) -> torch.Tensor:
        """uint8 [n, size, size, 3] on the device, n = len(batch). Raises Refused; the next batch is right again."""
        self._feed(batch, geometry)
        try:
            (images,) = self._pipe.run()
        except RuntimeError as error:
            self._pipe = self._build()  # a failed pipeline may be invalid, says DALI; a new one takes some milliseconds
            raise Refused(_reason(error)) from error
        decoded: torch.Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        return decoded

    def close(self) -> None:
        """Ends DALI's threads."""
        self._pipe = None

    def _feed(self, batch: EncodedBatch, geometry: Geometry) -> None:
        feed = self._pipe.feed_input
        feed("jpegs", batch.images())
        feed("anchor", np.ascontiguousarray(geometry.window[:, :2]))
        feed("shape", np.ascontiguousarray(geometry.window[:, 2:]))
        feed("mirror", geometry.flip)
        if self._reaches_outside:
            feed("crop", geometry.crop)
            return
        room = np.maximum(geometry.resize - self._size, 1)  # DALI's crop position is a share of the room there is
        position = (geometry.crop / room).astype(np.float32)
        feed("resize", geometry.resize.astype(np.float32))
        feed("crop_y", np.ascontiguousarray(position[:, 0]))
        feed("crop_x", np.ascontiguousarray(position[:, 1]))


def _build(
    size: int, decode: Where, device_id: int | None, threads: int, batch_size: int, load: float, reaches_outside: bool
) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    def given(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim, no_copy=True)

    def resized_crop(images: Any) -> Any:
        return fn.resize_crop_mirror(
            images,
            size=given("resize", types.FLOAT, 1),
            crop=(size, size),
            crop_pos_y=given("crop_y", types.FLOAT, 0),
            crop_pos_x=given("crop_x", types.FLOAT, 0),
            mirror=given("mirror", types.INT32, 0),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )

    def padded_crop(images: Any) -> Any:
        place = {"start": given("crop", types.INT32, 1), "shape": (size, size), "axis_names": "HW"}
        images = fn.slice(images, **place, out_of_bounds_policy="pad", fill_values=0)
        return fn.flip(images, horizontal=given("mirror", types.INT32, 0))

    # Depth 1: a batch goes in and comes out, so that one that is refused can be replayed. The producer thread keeps
    # the next batches ready; deeper pipes would only hide the same wait.
    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    def graph() -> Any:
        hardware = {"hw_decoder_load": load} if decode == "gpu" else {}
        images = fn.decoders.image_slice(  # type: ignore[call-overload]
            given("jpegs", types.UINT8, 1),
            given("anchor", types.INT32, 1),
            given("shape", types.INT32, 1),
            device="mixed" if decode == "gpu" else "cpu",
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.RGB,
            adjust_orientation=False,
            **hardware,
        )
        images = padded_crop(images) if reaches_outside else resized_crop(images)
        return images.gpu() if device_id is not None and decode == "cpu" else images

    pipe = graph()
    pipe.build()
    return pipe


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if "decode" in line.lower() or "nvimagecodec" in line.lower()]
    return (telling or lines)[-1][:160]
