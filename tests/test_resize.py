"""--resize: larger images are stored smaller, from the decoder's pixels; the others keep their bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from jobs import pack as job
from pipelines.checking import checked
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError
from pipelines.packing.resize import Resize
from pipelines.reader import Reader
from pipelines.sources import Item
from tests.jpegs import KINDS, encode, jpeg, picture


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (40, 60, (40, 60)),  # no larger
        (39, 400, (39, 400)),
        (41, 60, (40, 58)),  # the long side is rounded down, as torchvision's Resize does
        (60, 41, (58, 40)),
        (80, 80, (40, 40)),
        (1, 1, (1, 1)),
        (41, 65535, (40, 63936)),
    ],
)
def test_sizes(height, width, size):
    assert Resize(40).size(height, width) == size


def stored(data: bytes, resize: Resize) -> bytes:
    (image,) = checked([Item("x", 0, lambda: data)], 1, pixels=True)
    assert not image.fault
    return resize(image).data


def by_pillow(data: bytes, resize: Resize) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = resize.size(image.height, image.width)
    return encode(image.resize((width, height), Image.Resampling.LANCZOS), quality=resize.quality)


@pytest.mark.parametrize("kind", ["garbled", "png", "cmyk", "grey", "rotated", "progressive"])
def test_pixels_are_those_of_training_which_are_pillows(kind):
    """Nothing is rotated by EXIF, CMYK is converted as Pillow does it."""
    data = KINDS[kind][0](7)
    assert stored(data, Resize(40, 80)) == by_pillow(data, Resize(40, 80))


def test_16_bits_are_scaled_and_not_clipped():
    """Pillow's own conversion would turn all but the darkest levels white."""
    levels = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    found = np.asarray(Image.open(io.BytesIO(stored(buffer.getvalue(), Resize(40, 95)))))
    assert found.shape == (40, 53, 3)
    assert abs(found.mean() - 127.5) < 2
    assert (np.abs(np.diff(found[:, 20, 0].astype(int)) - 255 / 40) < 3).all()


@pytest.mark.parametrize("data", [jpeg(1, 40, 70), jpeg(1, 70, 40), encode(picture(2, 30, 30), "PNG"), jpeg(1, 1, 1)])
def test_images_that_are_no_larger_keep_their_bytes(data):
    assert stored(data, Resize(40)) == data


@pytest.fixture
def folders(tmp_path):
    for split in ("train", "val"):
        for i in range(12):
            path = tmp_path / "in" / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i, 30 + 4 * i, 90))
    return ["folder", "--train", str(tmp_path / "in" / "train"), "--val", str(tmp_path / "in" / "val")]


def test_a_dataset_of_smaller_images(folders, tmp_path, capsys):
    out = ["--resize", "50", "--quality", "70", "--shard-samples", "5"]
    assert job.main([*folders, "--out", str(tmp_path / "out"), *out]) == 0
    made = open_dataset(tmp_path / "out")
    assert made.made["resize"] == {"short_side": 50, "quality": 70}
    index = made.index("train")
    assert sorted(zip(index["height"].tolist(), index["width"].tolist(), strict=True)) == sorted(
        Resize(50).size(30 + 4 * i, 90) for i in range(12)
    )
    batch = Reader(made, "train").read(np.arange(12))
    wanted = {
        by_pillow(jpeg(i, 30 + 4 * i, 90), Resize(50, 70)) if i > 5 else jpeg(i, 30 + 4 * i, 90) for i in range(12)
    }
    assert {image.tobytes() for image in batch.images()} == wanted
    assert job.main(["verify", str(tmp_path / "out"), "--decode"]) == 0
    assert job.main([*folders, "--out", str(tmp_path / "out"), *out]) == 0
    assert "is packed already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="made in another way"):
        job.main([*folders, "--out", str(tmp_path / "out"), "--resize", "50", "--shard-samples", "5"])


def test_how_images_were_resized_is_part_of_the_digest(folders, tmp_path):
    """Even where no image is larger, so that all bytes are the same."""
    for name, flags in (("none", []), ("large", ["--resize", "400"]), ("good", ["--resize", "400", "--quality", "95"])):
        job.main([*folders, "--out", str(tmp_path / name), *flags])
    digests = {open_dataset(tmp_path / name).digest for name in ("none", "large", "good")}
    assert len(digests) == 3
    assert open_dataset(tmp_path / "large").made["resize"] == {"short_side": 400, "quality": 90}
    assert len({(tmp_path / name / "train-000000.tar").read_bytes() for name in ("none", "large", "good")}) == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--quality", "80"], "--quality is 80, but images keep their bytes without --resize PX; give both"),
        (["--resize", "0"], "argument --resize: it is '0'; a whole number in 1"),
        (["--resize", "400", "--quality", "101"], "argument --quality: it is '101'"),
    ],
)
def test_settings_that_make_no_sense(folders, tmp_path, flags, says):
    with pytest.raises(ConfigError, match=says):
        job.main([*folders, "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
