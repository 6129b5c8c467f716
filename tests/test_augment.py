"""Crops and flips: published answers of Philox, torchvision's arithmetic stated a second time, distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.augment import ATTEMPTS, CROP, Augment, eval_geometry, pca_shift, philox, train_geometry, uniform
from pipelines.errors import ConfigError

sides = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox(np.array([counter], np.uint64), *key).tolist() == [list(answer)]


def test_numbers_depend_on_all_of_seed_purpose_epoch_and_id():
    base = {"seed": 1, "purpose": 2, "epoch": 3, "ids": np.array([4]), "count": 4}
    others = [{"seed": 2}, {"seed": 1 + 2**32}, {"purpose": 3}, {"epoch": 4}, {"ids": np.array([4 + 2**32])}]
    drawn = [uniform(**base | other) for other in [{}, *others]]
    assert len({tuple(d[0]) for d in drawn}) == len(drawn)
    assert (uniform(**base) == drawn[0]).all()


def test_numbers_are_uniform():
    """Mean, variance and the serial correlation of 400,000 numbers within four standard errors."""
    u = uniform(5, CROP, 0, np.arange(100_000), 4).ravel()
    n = len(u)
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)
    assert (u.min() >= 0, u.max() < 1) == (True, True)


def torchvision_resized_crop(u, height, width, scale, ratio):
    """RandomResizedCrop.get_params written down again, one image at a time, with its four draws taken from u."""
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for a, r, y, x in u:
        target = area * (scale[0] + a * (scale[1] - scale[0]))
        aspect = math.exp(low + r * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@given(st.lists(sides, min_size=1, max_size=20), st.integers(0, 2**32), st.sampled_from([(0.08, 1), (0.9, 1), (1, 1)]))
def test_windows_are_torchvisions(sizes, seed, scale):
    augment = Augment(scale=scale)
    ids = np.arange(len(sizes)) * 7919
    u = uniform(seed, CROP, 3, ids, 4 * ATTEMPTS).reshape(-1, ATTEMPTS, 4)
    found = train_geometry(augment, seed, 3, ids, np.array(sizes)).window
    expected = [torchvision_resized_crop(u[i], *size, scale, augment.ratio) for i, size in enumerate(sizes)]
    assert found.tolist() == [list(window) for window in expected]


@pytest.mark.parametrize(
    ("size", "window"),
    [  # no try fits when the whole area is asked for: the central fallback
        ((100, 1000), (0, 433, 100, 133)),
        ((1000, 100), (433, 0, 133, 100)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 4000), (0, 1999, 1, 1)),
    ],
)
def test_the_fallback(size, window):
    augment = Augment(scale=(1, 1))
    assert train_geometry(augment, 0, 0, np.arange(1), np.array([size])).window.tolist() == [list(window)]


@given(st.lists(sides, min_size=1, max_size=20), st.sampled_from(["none", "resized_crop", "short_side"]))
def test_every_window_lies_in_its_image_and_every_crop_in_its_window(sizes, kind):
    sizes, augment = np.array(sizes), Augment(kind)
    got = train_geometry(augment, 1, 2, np.arange(len(sizes)), sizes)
    y, x, h, w = got.window.T
    assert (np.minimum(y, x) >= 0).all()
    assert (np.minimum(h, w) >= 1).all()
    assert (y + h <= sizes[:, 0]).all()
    assert (x + w <= sizes[:, 1]).all()
    assert (got.crop >= 0).all()
    assert (got.crop + augment.size <= got.resize).all()


@given(st.permutations(range(12)), st.sampled_from(["none", "resized_crop", "short_side", "pad_crop"]))
def test_a_sample_is_cropped_alike_in_any_company(order, kind):
    ids, sizes = np.arange(100, 112), np.arange(24).reshape(12, 2) * 30 + 50
    whole = train_geometry(Augment(kind, size=48), 9, 4, ids, sizes)
    rows = list(order)[:5]
    part = train_geometry(Augment(kind, size=48), 9, 4, ids[rows], sizes[rows])
    for name in ("window", "resize", "crop", "flip"):
        assert (getattr(whole, name)[rows] == getattr(part, name)).all()


@pytest.mark.parametrize(
    ("resize", "size", "image", "resized", "crop"),
    [
        (256, 224, (375, 500), (256, 341), (16, 58)),  # 341.33 is truncated; 58.5 to the even 58
        (256, 224, (500, 375), (341, 256), (58, 16)),
        (256, 224, (480, 640), (256, 341), (16, 58)),
        (256, 224, (256, 257), (256, 257), (16, 16)),  # 16.5 to the even 16
        (256, 224, (256, 259), (256, 259), (16, 18)),  # 17.5 to the even 18
        (256, 224, (10, 10), (256, 256), (16, 16)),
        (16, 16, (16, 16), (16, 16), (0, 0)),
        (232, 224, (1, 3000), (232, 696000), (4, 347888)),
    ],
)
def test_evaluation_is_torchvisions_resize_and_centre_crop(resize, size, image, resized, crop):
    got = eval_geometry(resize, size, [image])
    assert (tuple(got.resize[0]), tuple(got.crop[0])) == (resized, crop)
    assert got.window.tolist() == [[0, 0, *image]]
    assert got.flip.tolist() == [0]


@given(st.lists(sides, min_size=1, max_size=20), st.integers(1, 400))
def test_the_evaluations_size_is_torchvisions_formula(sizes, resize):
    for (height, width), found in zip(sizes, eval_geometry(resize, 1, sizes).resize.tolist(), strict=True):
        short, long = min(height, width), max(height, width)
        scaled = int(resize * long / short)
        assert found == ([resize, scaled] if height <= width else [scaled, resize])


def test_the_papers_short_side_is_uniform_and_its_crop_random():
    """A window of 224 * short / s px: s must fill [256, 480] evenly, the place the whole image."""
    n = 20_000
    got = train_geometry(Augment("short_side"), 0, 0, np.arange(n), np.full((n, 2), (4800, 6000))).window
    short = 224 * 4800 / got[:, 2]
    assert (got[:, 2] == got[:, 3]).all()
    assert (round(short.min()), round(short.max())) == (256, 480)
    assert abs(short.mean() - 368) < 4 * 225 / math.sqrt(12 * n)
    place = got[:, 1] / (6000 - got[:, 3])
    assert abs(place.mean() - 0.5) < 4 / math.sqrt(12 * n)


def test_cifars_crops_begin_at_each_of_81_places_equally_often():
    """Pad 4, crop 32 of 32: y and x in -4..4. 30,000 draws, chi-squared of 80 degrees: mean 80, deviation 12.6."""
    n = 30_000
    got = train_geometry(Augment("pad_crop", size=32, pad=4), 1, 2, np.arange(n), np.full((n, 2), 32))
    assert (got.window == [0, 0, 32, 32]).all()
    assert (got.resize == 32).all()
    places, seen = np.unique(got.crop, axis=0, return_counts=True)
    assert places.tolist() == [[y, x] for y in range(-4, 5) for x in range(-4, 5)]
    assert ((seen - n / 81) ** 2 / (n / 81)).sum() < 80 + 4 * 12.6


@given(st.lists(sides, min_size=1, max_size=20), st.integers(1, 64), st.integers(0, 40))
def test_a_padded_crop_leaves_the_image_by_the_padding_at_most(sizes, size, pad):
    sizes, augment = np.array(sizes), Augment("pad_crop", size=size, pad=pad)
    if sizes.min() + 2 * pad < size:
        with pytest.raises(ConfigError, match=rf"smallest training image has a side of {sizes.min()} px"):
            augment.check(int(sizes.min()))
        return
    augment.check(int(sizes.min()))
    crop = train_geometry(augment, 1, 2, np.arange(len(sizes)), sizes).crop
    assert (crop >= -pad).all()
    assert (crop + size <= sizes + pad).all()


def test_the_padding_that_is_advised_is_the_least_that_fits():
    with pytest.raises(ConfigError, match=r"data.size = 32 and data.pad = 4, .* side of 23 px; .* data.pad to 5"):
        Augment("pad_crop", size=32, pad=4).check(23)
    Augment("pad_crop", size=32, pad=5).check(23)
    Augment("resized_crop", size=32).check(1)


def test_half_of_the_images_are_mirrored_or_none():
    ids, sizes = np.arange(10_000), np.full((10_000, 2), 300)
    flipped = train_geometry(Augment(), 0, 0, ids, sizes).flip.mean()
    assert abs(flipped - 0.5) < 4 * 0.5 / 100
    assert not train_geometry(Augment(flip=False), 0, 0, ids, sizes).flip.any()


def test_colour_noise_has_the_papers_covariance():
    """Each principal direction of ImageNet's colours, with a deviation of std times its eigenvalue."""
    shift = pca_shift(0, 0, np.arange(50_000), std=0.1).astype(np.float64)
    assert shift.shape == (50_000, 3)
    values = np.sqrt(np.sort(np.linalg.eigvalsh(np.cov(shift.T)))[::-1])
    assert values == pytest.approx([0.02175, 0.00188, 0.00045], rel=0.03)
    assert abs(shift.mean()) < 4 * 0.02175 / math.sqrt(50_000)
    assert (pca_shift(0, 0, np.array([7])) == shift[7].astype(np.float32)).all()
