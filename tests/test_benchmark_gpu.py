"""The GPU's benchmark runs without a GPU and with little installed, and claims nothing that no GPU has produced."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu
from benchmarks.gpu_report import (
    CEILING,
    DEVICE,
    ENGINE,
    PLACE,
    ROWS,
    SHARE,
    TRAIN,
    UNMEASURED,
    columns,
    difference,
    table,
)
from benchmarks.photographs import ZIGZAG, encode, photograph, synthesise
from pipelines.errors import ConfigError
from pipelines.reader import Reader

ROOT = Path(__file__).parent.parent
ABSENT = ["ray", "mlflow", "obstore", "webdataset", "sklearn", "scipy", "psutil", "matplotlib", "rich", "PIL",
          "pydantic_settings", "yaml"]  # fmt: skip
WITHOUT = (
    f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from jobs import edge; from benchmarks import gpu; "
)


@pytest.mark.slow
def test_it_runs_with_little_installed_and_claims_nothing_for_a_gpu(tmp_path):
    file = tmp_path / "gpu.json"
    # As on a machine without a GPU, also where there is one: the figures asked for here are a CPU's.
    code = WITHOUT + "gpu.torch.cuda.is_available = bool; edge.run(gpu.main)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "--quick", "--json", str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no --data: making 16 photograph-like JPEGs" in done.stdout
    written = json.loads(file.read_text())
    assert written["gpu"] == dict.fromkeys(ROWS, UNMEASURED)
    assert written["data"]["source"] == "synthesised"
    assert written["cpu"][CEILING]["images_per_s"] > 0
    assert 0 <= written["cpu"][TRAIN["cpu"]]["waiting_for_data"] <= 1
    assert written["cpu"][PLACE] == {"max": 0, "mean": 0.0, "images": 0.0}
    lines = done.stdout.splitlines()[2:]
    assert len(lines) == len(ROWS)
    assert all(UNMEASURED in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quick", "--batch", "9"], "--batch is 9, which --lanes = 2 does not divide"),
        (["--quick", "--rounds", "0"], "--rounds is 0; at least 1 is needed"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as refused:
        gpu.main(flags)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


def test_a_dataset_that_is_too_small_for_a_step_is_refused(tmp_path):
    synthesise(tmp_path / "few", 3)
    with pytest.raises(ConfigError, match="one step takes 8 samples"):
        gpu.main(["--quick", "--data", str(tmp_path / "few")])


def test_a_gpu_s_figures_stand_in_its_column_alone():
    speed = {"images_per_s": 2905.4, "range": [2890.0, 2910.0], "seconds": 1.0, "waiting_for_data": 0.02}
    rows = dict.fromkeys(ROWS, speed) | {DEVICE: {"gib": 21.25}, SHARE: {"max": 0, "mean": 0.0, "images": 0.0}}
    rows |= {ENGINE[0.65]: {"max": 3, "mean": 0.25, "images": 0.5}}
    shown = columns(rows, on_gpu=True)
    assert list(shown) == ["gpu"]
    lines = {line.split("  ")[0]: line for line in table(shown).splitlines()}
    assert lines[CEILING].endswith("2,905 img/s (2,890-2,910), 2% waiting for data")
    assert lines[DEVICE].endswith("21.2 GiB")
    assert lines[ENGINE[0.65]].endswith("max 3, mean 0.250, 50% of images")
    assert lines[SHARE].endswith("  no")
    assert UNMEASURED not in table(shown)


def test_difference_counts_levels_and_images():
    a = np.zeros((4, 2, 2, 3), np.uint8)
    b = a.copy()
    b[1, 0, 1, 2], b[3] = 255, 1
    assert difference(a, b) == {"max": 255, "mean": (255 + 12) / 48, "images": 0.5} == difference(b, a)


def test_zigzag_is_the_standard_s():
    assert ZIGZAG[:10].tolist() == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]
    assert ZIGZAG[-4:].tolist() == [47, 55, 62, 63]
    assert sorted(ZIGZAG) == list(range(64))


@pytest.mark.parametrize(
    ("height", "width", "quality"), [(64, 96, 90), (33, 17, 90), (8, 8, 50), (40, 24, 100), (48, 48, 5)]
)
def test_jpegs_lose_what_pillow_s_lose(height, width, quality):
    image = photograph(height, width, seed=height)
    other = io.BytesIO()
    Image.fromarray(image).save(other, "JPEG", quality=quality)
    ours, theirs = (opened(data) for data in (encode(image, quality), other.getvalue()))
    assert ours.shape == image.shape
    losses = [np.abs(decoded - image.astype(float)).mean() for decoded in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def test_long_runs_of_zeros_and_large_values_survive():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8] = np.indices((8, 32)).sum(0)[..., None] % 2 * 255  # the highest frequency alone: 62 zeros before it
    assert np.abs(opened(encode(image, 100)).astype(int) - image).max() <= 3


def test_photographs_are_a_dataset_of_imagenet_s_bytes(tmp_path):
    dataset = synthesise(tmp_path / "made", 5, threads=2)
    reader = Reader(dataset, "train")
    batch = reader.read(np.arange(5))
    reader.close()
    assert batch.intact.all()
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]
    assert 90_000 < len(batch.data) / 5 < 140_000
    assert [opened(batch.image(i).tobytes()).shape[:2] for i in range(5)] == [
        tuple(size) for size in batch.sizes.tolist()
    ]
    with tarfile.open(tmp_path / "made" / "train-000000.tar") as tar:
        assert tar.getnames()[:2] == ["00000000.jpg", "00000000.cls"]
    again = synthesise(tmp_path / "again", 5)
    assert again.digest == dataset.digest
