"""What `jobs.pack info` tells and draws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs import pack as job
from pipelines.errors import ConfigError
from pipelines.survey import CAPTION, COLUMNS, TILE, describe, histogram, sheet, spread
from tests.datasets import make, overwrite, reopened
from tests.jpegs import encode


@pytest.mark.parametrize(
    ("values", "lines"),
    [  # bins begin at 1, 2, 3, 4, 6, 8, 12, 16 ...; empty ones between others are shown
        ([1], [(1, 1, 1)]),
        ([2, 3, 4, 5], [(2, 2, 1), (3, 3, 1), (4, 5, 2)]),
        ([32] * 3 + [48], [(32, 47, 3), (48, 63, 1)]),
        ([1, 8], [(1, 1, 1), (2, 2, 0), (3, 3, 0), (4, 5, 0), (6, 7, 0), (8, 11, 1)]),
        ([65535], [(49152, 65535, 1)]),
        ([65536], [(65536, 98303, 1)]),
    ],
)
def test_a_histogram_in_bins_that_grow_by_halves(values, lines):
    found = [line.replace(",", "").replace("to", "").split()[:3] for line in histogram(values)]
    assert [tuple(map(int, line)) for line in found] == lines


@given(st.lists(st.integers(1, 2**31), min_size=1, max_size=50))
def test_a_histogram_counts_everything_once(values):
    lines = [line.replace(",", "").replace("to", "").split() for line in histogram(values)]
    assert sum(int(line[2]) for line in lines) == len(values)
    assert int(lines[0][0]) <= min(values) <= int(lines[0][1])
    assert int(lines[-1][0]) <= max(values) <= int(lines[-1][1])
    assert max(len(line[3]) for line in lines if len(line) > 3) == 40


@given(st.lists(st.integers(0, 20), min_size=1, max_size=200), st.integers(1, 64))
def test_samples_are_spread_over_the_classes(labels, count):
    labels = np.array(labels, np.int32)
    ids = spread(labels, count)
    assert len(set(ids.tolist())) == len(ids) == min(count, len(labels))
    assert (np.diff(labels[ids]) >= 0).all()
    rare = np.bincount(labels).max() * count <= len(labels)
    assert not rare or len(set(labels[ids])) == min(count, len(ids))


@pytest.fixture
def dataset(tmp_path):
    return make(tmp_path / "data")


def test_what_a_dataset_is(dataset):
    text = describe(dataset)
    size = sum(path.stat().st_size for path in dataset.root.glob("train-*.tar")) / 1e6
    assert f"train       40 images in 5 shards, {size:,.1f} MB; 10 to 10 images a class" in text
    assert "val         10 images in 2 shards" in text
    assert "classes     4: a, b, c, d" in text
    assert f"digest      {dataset.digest}" in text
    assert "left out    0 images" in text
    index = np.concatenate([dataset.index("train"), dataset.index("val")])
    for what, values in (("bytes", index["size"]), ("px", np.minimum(index["height"], index["width"]))):
        assert "\n".join(histogram(values)) in text.split(f", {what}\n")[1]


def test_a_sheet_shows_the_samples_and_survives_a_bad_one(dataset, tmp_path):
    red = encode(Image.new("RGB", (64, 64), (220, 10, 10)))
    second = int(spread(dataset.index("train")["label"], 64)[1])
    for sample in range(40):
        overwrite(dataset, "train", sample, red)
    overwrite(dataset, "train", second, b"no image")
    path = tmp_path / "sheet"  # whatever its ending
    sheet(reopened(dataset), path)
    with Image.open(path) as page:
        assert page.format == "PNG"
        assert page.size == (COLUMNS * TILE, 5 * (TILE + CAPTION))
        middles = [page.getpixel((x * TILE + TILE // 2, TILE // 2)) for x in range(3)]
    assert middles[1] == (128, 128, 128)
    assert all(r > 200 and g < 40 for r, g, _ in (middles[0], middles[2]))


def test_the_job_draws_where_it_is_told(dataset, tmp_path, capsys):
    assert job.main(["info", str(dataset.root), "--sheet", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith("dataset     ")
    assert (tmp_path / "a.png").is_file()
    with pytest.raises(ConfigError, match=r"--sheet .*b\.png cannot be written: No such file or directory"):
        job.main(["info", str(dataset.root), "--sheet", str(tmp_path / "none" / "b.png")])
