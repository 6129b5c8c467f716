"""Pixels: evaluation as torchvision's on real and made JPEGs, crops independent of the batch, refusals that pass."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment import Augment, Geometry, eval_geometry, train_geometry
from pipelines.dali import Decoder, Refused, resolve_decode
from pipelines.errors import ConfigError
from pipelines.reader import EncodedBatch
from tests.datasets import MINI, MINI_TARS
from tests.jpegs import BROKEN, encode, evaluated, jpeg, picture


def batch(images: list[bytes], sizes=None) -> EncodedBatch:
    n = len(images)
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in images])]).astype(np.int64)
    data = np.frombuffer(b"".join(images), np.uint8)
    if sizes is None:
        sizes = [Image.open(io.BytesIO(i)).size[::-1] for i in images]
    zeros = np.zeros(n, np.int32)
    return EncodedBatch(np.arange(n), data, offsets, zeros, np.array(sizes), zeros.astype(np.uint32), np.ones(n, bool))


@pytest.fixture(scope="module")
def decoder():
    made = Decoder(48, "cpu", None, 2, 16)
    yield made
    made.close()


@pytest.fixture(scope="module")
def exact():
    made = Decoder(48, "cpu", None, 2, 16, exact=True)
    yield made
    made.close()


def pixels(decoder: Decoder, encoded: EncodedBatch, geometry: Geometry) -> np.ndarray:
    return decoder.decode(encoded, geometry).numpy().copy()


SHAPES = [(60, 80), (80, 60), (48, 48), (31, 200), (200, 31), (57, 58), (300, 301), (52, 640)]


@pytest.mark.parametrize("resize", [48, 55, 64])
def test_evaluation_agrees_with_pillow_on_made_images(exact, resize):
    images = [jpeg(i, *shape) for i, shape in enumerate(SHAPES)]
    encoded = batch(images)
    found = pixels(exact, encoded, eval_geometry(resize, 48, encoded.sizes)).astype(np.int16)
    assert found.shape == (len(images), 48, 48, 3)
    for image, mine in zip(images, found, strict=True):
        assert np.abs(mine - evaluated(image, resize, 48)).max() <= 1


@pytest.mark.skipif(not MINI.exists(), reason="no ImageNet sample on this machine (SKIPLANE_TEST_DATA)")
@pytest.mark.parametrize(("exact", "furthest", "mean"), [(True, 1, 0.25), (False, 2, 0.01)])
def test_evaluation_agrees_with_pillow_on_imagenet(exact, furthest, mean):
    """Exact: within 1 everywhere. The fast kernel is nearer in the mean, and 2 off in some ties."""
    with tarfile.open(MINI_TARS["val"]) as tar:
        images = [tar.extractfile(member).read() for member in tar.getmembers()[:64]]
    encoded, decoder = batch(images), Decoder(224, "cpu", None, 2, 64, exact=exact)
    found = pixels(decoder, encoded, eval_geometry(256, 224, encoded.sizes)).astype(np.int16)
    decoder.close()
    off = [np.abs(mine - evaluated(image, 256, 224)) for image, mine in zip(images, found, strict=True)]
    assert max(d.max() for d in off) <= furthest
    assert np.mean(off) < mean


ODD = {
    "grey": encode(picture(1, mode="L")),
    "cmyk": encode(picture(2, mode="CMYK")),
    "progressive": jpeg(3, progressive=True),
    "png named jpg": encode(picture(4), "PNG"),
    "trailing bytes": jpeg(5) + b"garbage" * 50,
    "rotated by exif": encode(picture(6), exif=(lambda e: (e.__setitem__(0x0112, 6), e)[1])(Image.Exif())),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_decode_as_pillow_does(exact, name):
    """EXIF orientation is not applied: windows are computed from the stored size, as torchvision does."""
    encoded = batch([ODD[name]])
    found = pixels(exact, encoded, eval_geometry(56, 48, encoded.sizes))[0].astype(np.int16)
    assert np.abs(found - evaluated(ODD[name], 56, 48)).max() <= 1


def test_a_training_crop_is_the_window_resized_and_mirrored(decoder):
    """Against Pillow: crop, resize, flip; enlarged and reduced."""
    images = [jpeg(i, 60 + 40 * i, 500 - 35 * i) for i in range(12)]
    encoded = batch(images)
    geometry = train_geometry(Augment(size=48), 3, 1, encoded.ids, encoded.sizes)
    assert 0 < geometry.flip.sum() < 12
    for i, mine in enumerate(pixels(decoder, encoded, geometry)):
        y, x, h, w = geometry.window[i].tolist()
        window = Image.open(io.BytesIO(images[i])).crop((x, y, x + w, y + h))
        wanted = np.asarray(window.resize((48, 48), Image.Resampling.BILINEAR), np.int16)
        wanted = wanted[:, ::-1] if geometry.flip[i] else wanted
        assert np.abs(mine - wanted).max() <= 1


@pytest.mark.parametrize("pad", [0, 4, 40])
def test_a_padded_crop_is_numpys(pad):
    """Bit for bit, corners included: the whole image decoded, np.pad with zeros, cut, mirrored."""
    size, shapes = 32, [(32, 32), (32, 41), (57, 32), (60, 80)] * 8
    encoded, decoder = batch([jpeg(i, *s) for i, s in enumerate(shapes)]), Decoder(size, "cpu", None, 2, 32)
    drawn = train_geometry(Augment("pad_crop", size=size, pad=pad), 5, 0, encoded.ids, encoded.sizes)
    corners = np.array([(y, x) for y in (0, 1) for x in (0, 1)] * 8)  # then each image at each of its corners
    far = corners * (encoded.sizes + 2 * pad - size) - pad
    for crop in (drawn.crop, far.astype(np.int32)):
        geometry = Geometry(drawn.window, drawn.resize, crop, drawn.flip)
        for i, mine in enumerate(pixels(decoder, encoded, geometry)):
            whole = np.asarray(Image.open(io.BytesIO(encoded.image(i).tobytes())))
            y, x = crop[i] + pad
            wanted = np.pad(whole, ((pad, pad), (pad, pad), (0, 0)))[y : y + size, x : x + size]
            assert (mine == (wanted[:, ::-1] if geometry.flip[i] else wanted)).all()
    decoder.close()


def test_pixels_depend_on_neither_place_nor_company_nor_threads(decoder):
    encoded = batch([jpeg(i, 70 + i, 90 - i) for i in range(12)])
    geometry = train_geometry(Augment(size=48), 0, 0, encoded.ids, encoded.sizes)
    whole = pixels(decoder, encoded, geometry)
    single = Decoder(48, "cpu", None, 1, 1)
    for i in (0, 5, 11):
        alone = pixels(single, encoded.row(i), geometry.take([i]))
        assert (alone[0] == whole[i]).all()
        assert (pixels(decoder, encoded.row(i), geometry.take([i]))[0] == whole[i]).all()
    single.close()


def test_a_batch_stays_as_it_is_while_others_are_decoded(decoder):
    """The tensor is DALI's own memory: later batches must not be written over it while it is held."""
    batches = [batch([jpeg(10 * b + i) for i in range(4)]) for b in range(6)]
    held = [decoder.decode(b, eval_geometry(48, 48, b.sizes)) for b in batches]
    again = [pixels(decoder, b, eval_geometry(48, 48, b.sizes)) for b in batches]
    assert all((kept.numpy() == made).all() for kept, made in zip(held, again, strict=True))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_refused_and_the_next_batch_is_right(decoder, kind):
    good = batch([jpeg(i) for i in range(4)])
    geometry = eval_geometry(48, 48, good.sizes)
    before = pixels(decoder, good, geometry)
    images = [jpeg(i) for i in range(4)]
    images[2] = BROKEN[kind](images[2])
    with pytest.raises(Refused, match=r"\w"):
        decoder.decode(batch(images, good.sizes), geometry)
    assert (pixels(decoder, good, geometry) == before).all()


def test_images_are_uint8_and_channels_last(decoder):
    encoded = batch([jpeg(0)])
    made = decoder.decode(encoded, eval_geometry(48, 48, encoded.sizes))
    assert (made.dtype, made.shape, made.device.type) == (torch.uint8, (1, 48, 48, 3), "cpu")


@pytest.mark.parametrize(
    ("wanted", "gpu", "found"),
    [("auto", True, "gpu"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cpu", False, "cpu"), ("gpu", True, "gpu")],
)
def test_where_images_are_decoded(wanted, gpu, found):
    assert resolve_decode(wanted, gpu) == found


def test_a_gpu_that_is_not_there_is_a_setting():
    with pytest.raises(ConfigError, match=r"data\.decode is gpu, .* use auto or cpu"):
        resolve_decode("gpu", False)
