"""Packing: what is written, what is refused, and that a packer killed at any moment leaves no dataset."""

import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from jobs import bar
from jobs import pack as job
from pipelines.dataset import open_dataset, verify
from pipelines.errors import ConfigError, DataError
from pipelines.pack import pack
from pipelines.reader import Reader
from tests.datasets import make, source
from tests.jpegs import encode, jpeg, picture

ROOT = Path(__file__).parent.parent


def tree(root: Path, classes: int = 3, images: int = 4) -> Path:
    for c in range(classes):
        (root / f"class-{c}").mkdir(parents=True)
        for i in range(images):
            (root / f"class-{c}" / f"{i}.jpg").write_bytes(jpeg(100 * c + i, 20 + i, 30 + c))
    return root


@pytest.fixture
def folders(tmp_path):
    return tree(tmp_path / "in" / "train"), tree(tmp_path / "in" / "val", images=2)


def flags(folders, out) -> list[str]:
    return ["folder", "--train", str(folders[0]), "--val", str(folders[1]), "--out", str(out), "--shard-samples", "5"]


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_digits(tmp_path, capsys):
    out = tmp_path / "digits"
    assert job.main(["digits", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "10 classes, 1,437 train in 8 shards, 360 val in 2 shards, digest " in said
    dataset = open_dataset(out)
    verify(dataset, "sha256")
    assert dataset.classes == tuple("0123456789")
    batch = Reader(dataset, "train").read(np.arange(1437))
    assert (batch.sizes == 16).all()
    assert batch.intact.all()
    counts = np.bincount(batch.labels) + np.bincount(Reader(dataset, "val").read(np.arange(360)).labels)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # the set's own
    assert left_in(tmp_path) == ["digits"]
    assert job.main(["digits", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} is packed already: digest {dataset.digest[:16]}\n"


def test_a_folder_is_packed_as_torchvision_numbers_it(folders, tmp_path):
    """Classes in sorted order; every image with its label, its bytes and its stored size."""
    (folders[0] / "class-0" / "deeper").mkdir()
    (folders[0] / "class-0" / "deeper" / "x.PNG").write_bytes(encode(picture(7, 9, 8), "PNG"))
    (folders[0] / "class-1" / "notes.txt").write_text("not an image, not a fault")
    assert job.main(flags(folders, tmp_path / "out")) == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.classes == ("class-0", "class-1", "class-2")
    assert dataset.splits["train"].counts == (5, 5, 3)
    reader = Reader(dataset, "train")
    batch = reader.read(np.arange(13))
    wanted = {p.read_bytes(): int(p.relative_to(folders[0]).parts[0][-1]) for p in folders[0].rglob("*.[jP]*")}
    assert {batch.image(i).tobytes(): int(batch.labels[i]) for i in range(13)} == wanted
    odd = [i for i in range(13) if "deeper" in reader.name(i)[1]]
    assert batch.sizes[odd].tolist() == [[9, 8]]
    assert (np.diff(batch.labels) < 0).any()  # shuffled, not class after class


def test_tars_open_with_webdataset_and_with_tarfile(tmp_path):
    import webdataset

    dataset = make(tmp_path / "data")
    urls = [str(dataset.root / shard.name) for shard in dataset.splits["train"].shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls"))
        gc.collect()
    batch = Reader(dataset, "train").read(np.arange(40))
    assert [label for _, _, label in samples] == batch.labels.tolist()
    assert [image.size[::-1] for _, image, _ in samples] == [tuple(size) for size in batch.sizes.tolist()]
    keys = [Reader(dataset, "train").name(i)[1] for i in range(40)]
    assert [key for key, _, _ in samples] == keys
    assert len(set(keys)) == 40
    with tarfile.open(urls[0]) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{key}.{kind}" for key in keys[:8] for kind in ("cls", "jpg")]
        images = [tar.extractfile(m).read() for m in members if m.name.endswith("jpg")]
    assert images == [batch.image(i).tobytes() for i in range(8)]


def test_the_same_images_and_seed_are_the_same_dataset_another_seed_another_order(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    assert one.digest == two.digest
    other = pack(source(), tmp_path / "other", seed=1, shard_samples=8, progress=lambda *_: None)
    assert other.digest != one.digest


def test_progress_is_told_image_by_image(tmp_path):
    heard = []
    pack(source(), tmp_path / "out", seed=0, shard_samples=8, progress=lambda *at: heard.append(at))
    assert heard == [("train", i, 40) for i in range(1, 41)] + [("val", i, 10) for i in range(1, 11)]


def test_progress_is_lines_where_there_is_no_terminal(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bar, "SECONDS", -1)
    job.main(flags(folders, tmp_path / "out"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    assert [line.split(",")[0] for line in lines] == [f"train {i} of 12 images" for i in range(2, 13)]
    assert all(re.search(r", [\d,]+ a second, \d+ s left$", line) for line in lines)


def test_the_rate_is_of_what_came_since_it_was_begun(capsys, monkeypatch):
    """400 images were done by an earlier packer; of the other 600 six take a second each."""
    now = iter(range(100, 200, 6))
    monkeypatch.setattr(bar.time, "monotonic", lambda: next(now))
    with bar.Bar() as shown:
        for done in (400, 406, 412):
            shown.show("train", done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "train 406 of 1,000 images, 1 a second, 594 s left",
        "train 412 of 1,000 images, 1 a second, 588 s left",
    ]


def test_on_a_terminal_there_is_a_bar(tmp_path):
    """As `script` sees it: on a terminal of its own."""
    if not shutil.which("script"):
        pytest.skip("no `script` here to make a terminal")
    line = f"{sys.executable} -m jobs.pack digits --out {tmp_path}/digits"
    shown = subprocess.run(["script", "-qec", line, "/dev/null"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert "100%" in shown.stdout
    assert "1,437 of 1,437 images" in shown.stdout
    assert "a second" in shown.stdout


def test_the_same_again_is_said_and_a_changed_source_is_refused(folders, tmp_path, capsys):
    assert job.main(flags(folders, tmp_path / "out")) == 0
    assert job.main(flags(folders, tmp_path / "out")) == 0
    assert "is packed already" in capsys.readouterr().out
    (folders[1] / "class-0" / "0.jpg").write_bytes(jpeg(5000, 99, 99))
    with pytest.raises(ConfigError, match="out holds a dataset that was made in another way; name a new folder"):
        job.main(flags(folders, tmp_path / "out"))


def test_a_packed_dataset_that_lost_a_shard_is_not_called_packed(folders, tmp_path):
    job.main(flags(folders, tmp_path / "out"))
    (tmp_path / "out" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing"):
        job.main(flags(folders, tmp_path / "out"))


def broken(what, train, val, out):
    """Damages the input or the target; (exit code, sentence)."""
    if what == "no such folder":
        shutil.rmtree(val)
        return 2, r"--val is .*val, which is not a folder"
    if what == "no classes":
        shutil.rmtree(train)
        train.mkdir()
        return 3, r"--train .*train has no class folders"
    if what == "class without images":
        for image in (train / "class-1").iterdir():
            image.unlink()
        return 3, r"class folder .*train/class-1 has no images"
    if what == "other classes":
        (val / "class-2").rename(val / "class-x")
        return 3, r"class folder 'class-2' is only in --train"
    if what == "dangling link":
        (train / "class-0" / "9.jpg").symlink_to("nowhere")
        return 3, r"class-0/9\.jpg cannot be read: No such file"
    if what == "target in use":
        out.mkdir()
        (out / "thesis.txt").touch()
        return 2, r"--out .*out holds something else"
    if what == "target is a file":
        out.touch()
        return 2, r"--out .*out cannot be written: Not a directory"
    out.parent.joinpath("file").touch()
    return 2, r"--out .*file/out cannot be written: (Not a directory|File exists)"


FAULTS = ["no such folder", "no classes", "class without images", "other classes", "dangling link"]


@pytest.mark.parametrize("what", [*FAULTS, "target in use", "target is a file", "target under a file"])
def test_bad_input_is_one_sentence_and_leaves_nothing(folders, tmp_path, what):
    out = tmp_path / "out"
    code, says = broken(what, *folders, out)
    before = sorted(tmp_path.rglob("*"))
    target = tmp_path / "file" / "out" if what == "target under a file" else out
    with pytest.raises((ConfigError, DataError), match=says) as caught:
        job.main(flags(folders, target))
    assert caught.value.exit_code == code
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["mnist"], "invalid choice: 'mnist'"),
        (["digits"], "the following arguments are required: --out"),
        (["digits", "--out", "x", "--size", "0"], "argument --size: it is '0'; a whole number in 1"),
        (["digits", "--out", "x", "--shard-samples", "many"], "argument --shard-samples: it is 'many'; a whole number"),
        (["digits", "--out", "x", "--seed=-1"], "argument --seed: it is '-1'; a whole number in 0"),
        (["folder", "--out", "x", "--train", "t"], "the following arguments are required: --val"),
        (["tars", "--out", "x", "--train", "t"], "the following arguments are required: --val"),
        (
            ["tars", "--out", "x", "--train", "t", "--val", "v", "--image", "jpg,"],
            "argument --image: it is 'jpg,'; ext",
        ),
        (["tars", "--out", "x", "--train", "t", "--val", "v", "--label", "xml:id"], "argument --label: it is 'xml:id'"),
        (["digits", "--out", "x", "--workers", "0"], "argument --workers: it is '0'; a whole number in 1"),
    ],
)
def test_wrong_flags_are_settings(argv, says):
    with pytest.raises(ConfigError, match=says):
        job.main(argv)


def test_the_command_prints_one_line_and_exits_with_the_errors_code(tmp_path):
    command = [sys.executable, "-m", "jobs.pack", "folder", "--train", "/nowhere", "--val", "v", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: --train is /nowhere, which is not a folder; name a folder of class folders\n"


SLOW_PACKER = """
import sys, time
from pathlib import Path
from dataclasses import replace
from pipelines.pack import pack
from tests.datasets import source

def progress(split, done, total):
    print(split, done, flush=True)
    if (split, done) == (sys.argv[2], int(sys.argv[3])):
        time.sleep(600)

pack(source(), Path(sys.argv[1]), seed=0, shard_samples=8, progress=progress)
"""


@pytest.mark.parametrize(("at", "done"), [(("train", 1), 0), (("train", 20), 2), (("val", 10), 6)])
def test_a_packer_killed_at_any_moment_leaves_no_dataset_and_the_next_one_goes_on(tmp_path, at, done):
    """SIGKILL, when the first image, half of them and the very last one are written."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW_PACKER, str(out), at[0], str(at[1])]
    packer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert f"{at[0]} {at[1]}\n" in iter(packer.stdout.readline, "")
        with pytest.raises(ConfigError, match="is being packed by another process"):
            make(out)
    finally:
        os.kill(packer.pid, signal.SIGKILL)
        packer.wait()
        packer.stdout.close()
    with pytest.raises(DataError, match="out is being packed, or packing was cut short; give the job"):
        open_dataset(out)
    heard = []
    packed = pack(
        source(),
        out,
        seed=0,
        shard_samples=8,
        progress=lambda *_: None,
        going_on=lambda *found: heard.append(found),
    )
    assert heard == ([(done, 7)] if done else [])
    verify(packed, "sha256")
    assert contents(out) == contents(make(tmp_path / "whole").root)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_packer_that_is_interrupted_leaves_nothing_at_all(tmp_path):
    def progress(split, done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source(), tmp_path / "out", seed=0, shard_samples=8, progress=progress)
    assert left_in(tmp_path) == []


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(tmp_path):
    """A real refusal of the kernel: files may not grow beyond 20 kB for the moment."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"--out .*data cannot be written: File too large; make room"):
            make(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert make(tmp_path / "data").splits["train"].samples == 40


def test_an_empty_folder_may_be_the_target(tmp_path):
    (tmp_path / "out").mkdir()
    assert make(tmp_path / "out").splits["train"].samples == 40


def test_the_manifest_can_be_read_by_people_and_scripts(tmp_path):
    document = json.loads((make(tmp_path / "data").root / "dataset.json").read_text())
    assert document["format"] == 1
    assert document["made"] == {"source": "test", "shuffle_seed": 0, "shard_samples": 8}
    assert set(document["splits"]["train"]["shards"][0]) == {"name", "samples", "bytes", "sha256"}
