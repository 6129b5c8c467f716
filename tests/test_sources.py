"""Sources: the official ImageNet tars and zips, read where they lie; classes and labels by torchvision's rules."""

import io
import tarfile
import zipfile
from collections import Counter
from pathlib import PurePosixPath

import numpy as np
import pytest

from jobs import pack as job
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from pipelines.index import BLOCK
from pipelines.pack import left_out_of, pack
from pipelines.sources import BadImage
from pipelines.sources.folder import folder
from pipelines.sources.ilsvrc import ilsvrc
from pipelines.sources.zip import zipped
from tests.datasets import CIFAR10_ZIP, MINI, MINI_TARS
from tests.jpegs import jpeg

# ILSVRC2012_ID -> WNID in neither's order, and a group of classes, which is none itself
SYNSETS = {1: "n00000003", 2: "n00000001", 3: "n00000004", 4: "n00000002", 5: "n00000009"}
GROUPS = {5}
TRAIN = {"n00000003": 3, "n00000001": 2, "n00000004": 1, "n00000002": 2}  # images, in the tar's order
TRUTH = [3, 1, 1, 2, 4]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tarred(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files:
            add(tar, name, data)
    return buffer.getvalue()


def devkit_bytes(truth=TRUTH):
    from scipy.io import savemat

    rows = [(number, wnid, "words", int(number in GROUPS)) for number, wnid in SYNSETS.items()]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, fields).reshape(-1, 1)})
    lines = "".join(f"{number}\n" for number in truth).encode()
    data = "ILSVRC2012_devkit_t12/data/"
    return tarred(
        [(data + "meta.mat", buffer.getvalue()), (data + "ILSVRC2012_validation_ground_truth.txt", lines)], "w:gz"
    )


def class_tar(wnid, count):
    number = int(wnid[1:])
    return tarred([(f"{wnid}_{i}.JPEG", jpeg(10 * number + i)) for i in range(count)])


@pytest.fixture
def tars(tmp_path):
    """A synthetic ImageNet of four classes; its validation images are not in the order of their names."""
    train = tarred([(f"{wnid}.tar", class_tar(wnid, count)) for wnid, count in TRAIN.items()])
    val = tarred([(f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(100 + i)) for i in (2, 1, 5, 3, 4)])
    found = {}
    for name, data in (("train", train), ("val", val), ("devkit", devkit_bytes())):
        found[name] = tmp_path / f"{name}.tar"
        found[name].write_bytes(data)
    return found


def images(source, split):
    """(name, class, bytes) of each image."""
    items = source.splits[split]
    return [(item.name, source.classes[item.label], item.load()) for item in (items[i] for i in range(len(items)))]


def test_official_tars_are_read_where_they_lie(tars):
    source = ilsvrc(**tars, expect="any")
    assert source.classes == ("n00000001", "n00000002", "n00000003", "n00000004")  # the group is none
    wanted = [(f"{w}_{i}.JPEG", w, jpeg(10 * int(w[1:]) + i)) for w, count in TRAIN.items() for i in range(count)]
    assert images(source, "train") == wanted
    classes = [SYNSETS[number] for number in TRUTH]
    assert images(source, "val") == [
        (f"ILSVRC2012_val_{i:08d}.JPEG", wnid, jpeg(100 + i)) for i, wnid in enumerate(classes, 1)
    ]


def test_what_was_listed_is_part_of_how_it_was_made(tars):
    first, again = (ilsvrc(**tars, expect="any").made for _ in range(2))
    assert first == again
    tars["devkit"].write_bytes(devkit_bytes([3, 1, 2, 2, 4]))
    assert ilsvrc(**tars, expect="any").made != first


def test_counts_are_the_official_ones_unless_said(tars):
    with pytest.raises(DataError, match=r"8 training images were found, the official set has 1,281,167; .*expect any"):
        ilsvrc(**tars)


def val_of(count):
    return tarred([(f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(i)) for i in range(count)])


def without_mark(data):
    """Cut between two members: what is left are whole members, and no end mark."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return data[: last.offset]


WRONG = {  # which tar -> (its bytes from the right ones, what is said)
    "cut in an image": ("val", lambda data: data[: 3 * BLOCK], r"--val .* is not a plain tar, or cut short"),
    "cut between images": ("val", without_mark, r"--val .* cut short \(its end mark is missing\)"),
    "cut between classes": ("train", without_mark, r"--train .* cut short \(its end mark is missing\)"),
    "a class cut between images": (
        "train",
        lambda data: tarred([("n00000001.tar", without_mark(class_tar("n00000001", 3)))]),
        r"n00000001\.tar in --train .* cut short \(its end mark is missing\)",
    ),
    "a class cut in an image": (
        "train",
        lambda data: tarred([("n00000001.tar", class_tar("n00000001", 3)[: 5 * BLOCK + 7])]),
        r"n00000001\.tar in --train .* cut short",
    ),
    "a header overwritten": (
        "val",
        lambda data: data.replace(b"ILSVRC2012_val_00000005", b"\xffLSVRC2012_val_00000005"),
        r"--val .* cut short \(its end mark is missing\)",
    ),
    "empty": ("train", lambda data: b"", r"--train .* is not a plain tar"),
    "no class": ("train", lambda data: tarred([]), r"--train .* no class at all"),
    "compressed": ("train", lambda data: tarred([("n00000001.tar", b"")], "w:gz"), r"--train .* is not a plain tar"),
    "the validation tar": (
        "train",
        lambda data: val_of(3),
        r"--train .* holds 'ILSVRC2012_val_00000000\.JPEG'; only a",
    ),
    "an unknown class": ("train", lambda data: tarred([("n00000007.tar", b"")]), r"holds 'n00000007\.tar'"),
    "a group as a class": ("train", lambda data: tarred([("n00000009.tar", b"")]), r"holds 'n00000009\.tar'"),
    "an empty class": ("train", lambda data: tarred([("n00000001.tar", tarred([]))]), r"a class without images"),
    "fewer images": ("val", lambda data: val_of(4), r"--val .* has 4 images, --devkit knows 5"),
    "fewer classes": (
        "train",
        lambda data: tarred([("n00000001.tar", class_tar("n00000001", 1))]),
        r"--val .* has images of class 'n00000002', which --train lacks",
    ),
    "no devkit": ("devkit", lambda data: b"<html>", r"--devkit .* is not ILSVRC2012_devkit_t12"),
    "a devkit cut short": ("devkit", lambda data: data[:-60], r"--devkit .* is not ILSVRC2012_devkit_t12"),
    "a devkit without data": ("devkit", lambda data: tarred([("x", b"")]), r"--devkit .* is not ILSVRC2012_devkit_t12"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tars_that_are_not_whole_or_not_right_are_refused(tars, wrong):
    name, change, says = WRONG[wrong]
    tars[name].write_bytes(change(tars[name].read_bytes()))
    with pytest.raises(DataError, match=says):
        ilsvrc(**tars, expect="any")


def test_a_tar_that_is_not_there_is_a_setting(tars, tmp_path):
    with pytest.raises(ConfigError, match=r"--devkit is .*none, which is not a file"):
        ilsvrc(tars["train"], tars["val"], tmp_path / "none")


def test_a_tar_that_shrinks_while_it_is_packed_is_noticed(tars):
    source = ilsvrc(**tars, expect="any")
    tars["val"].write_bytes(b"")
    with pytest.raises(BadImage, match="ends before it"):
        source.splits["val"][0].load()


def test_a_lists_place_is_small(tars):
    """1.28 million items would be half a gigabyte of Python objects: they are made when asked for."""
    listed = ilsvrc(**tars, expect="any").splits["train"]
    assert listed.members.nbytes + listed.names.nbytes <= 64 * len(listed)


def torchvisions_val(devkit):
    """torchvision.datasets.imagenet's parse_devkit, written again: WNIDs of the validation images in order."""
    from scipy.io import loadmat

    with tarfile.open(devkit) as tar:
        root = "ILSVRC2012_devkit_t12/data/"
        meta = loadmat(io.BytesIO(tar.extractfile(root + "meta.mat").read()), squeeze_me=True)["synsets"]
        truth = tar.extractfile(root + "ILSVRC2012_validation_ground_truth.txt").read().splitlines()
    wnids = {number: wnid for number, wnid, _, _, children, *_ in (list(row) for row in meta) if children == 0}
    return [wnids[int(line)] for line in truth]


@pytest.mark.skipif(not MINI.exists(), reason="no ImageNet sample on this machine (SKIPLANE_TEST_DATA)")
def test_a_real_one_has_torchvisions_labels(tmp_path, capsys):
    flags = [word for name, path in MINI_TARS.items() for word in (f"--{name}", str(path))]
    with pytest.raises(DataError, match="400 training images were found"):
        job.main(["ilsvrc", *flags, "--out", str(tmp_path / "mini")])
    assert job.main(["ilsvrc", *flags, "--expect", "any", "--out", str(tmp_path / "mini")]) == 0
    made = open_dataset(tmp_path / "mini")
    source = ilsvrc(**MINI_TARS, expect="any")
    with tarfile.open(MINI_TARS["train"]) as tar:
        wnids = sorted(PurePosixPath(m.name).stem for m in tar)
        bytes_of = {}
        for member in tar:
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                bytes_of |= {PurePosixPath(m.name).name: inner.extractfile(m).read() for m in inner}
    assert made.classes == tuple(wnids)
    assert Counter(made.index("train")["label"].tolist()) == Counter(range(400))
    assert {name: data for name, _, data in images(source, "train")} == bytes_of
    assert all(name.startswith(wnid + "_") for name, wnid, _ in images(source, "train"))
    with tarfile.open(MINI_TARS["val"]) as tar:
        val = [(m.name, tar.extractfile(m).read()) for m in sorted(tar, key=lambda m: m.name)]
    labels = torchvisions_val(MINI_TARS["devkit"])
    assert images(source, "val") == [(n, wnid, data) for (n, data), wnid in zip(val, labels, strict=True)]


def write_zip(path, names, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for i, name in enumerate(names):
            archive.writestr(name, jpeg(i) if name.endswith("jpg") else b"")
    return path


CLASSES = [f"set/{split}/{c}/{i}.jpg" for split in ("train", "test") for c in ("cat", "ant") for i in range(3)]


def test_a_zip_is_as_its_folders(tmp_path):
    noise = ["set/", "set/train/", "set/train/readme.txt", "set/train/stray.jpg", "__MACOSX/set/train/cat/0.jpg"]
    file = write_zip(tmp_path / "set.zip", [*CLASSES, *noise])
    source = zipped(file)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "unpacked", CLASSES)
    beside = folder(tmp_path / "unpacked/set/train", tmp_path / "unpacked/set/test")
    assert source.classes == beside.classes == ("ant", "cat")
    for split in ("train", "val"):
        assert images(source, split) == images(beside, split)
    assert (source.made["train"], source.made["val"]) == ("set/train", "set/test")
    assert images(zipped(file, "set/test", "set/train"), "val") == images(beside, "train")


@pytest.mark.parametrize(
    ("names", "flags", "kind", "says"),
    [
        (
            ["x/cat/0.jpg"],
            {},
            ConfigError,
            r"--train is needed, as .* has 0 folders .* named as usual; there are \., x",
        ),
        (
            [*CLASSES, "set/val/cat/0.jpg"],
            {},
            ConfigError,
            r"--val is needed, as .* has 2 .*; there are set/test, set/val",
        ),
        (CLASSES, {"train": "set/cat"}, ConfigError, r"--train is 'set/cat', which is no folder of class folders in"),
        ([], {}, ConfigError, "there are none"),
        ([*CLASSES, "set/train/dog/0.jpg"], {}, DataError, "class folder 'dog' is only in --train"),
    ],
)
def test_zips_that_do_not_say_what_is_meant_are_refused(tmp_path, names, flags, kind, says):
    with pytest.raises(kind, match=says):
        zipped(write_zip(tmp_path / "a.zip", names), **flags)


def test_what_is_no_zip_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"FILE\.zip is .*, which is not a file"):
        zipped(tmp_path / "none.zip")
    file = write_zip(tmp_path / "a.zip", CLASSES)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="is not a zip, or cut short"):
        zipped(file)


def test_an_image_that_is_damaged_in_its_zip_is_left_out(tmp_path):
    file = write_zip(tmp_path / "a.zip", CLASSES, zipfile.ZIP_STORED)
    data = bytearray(file.read_bytes())
    data[data.index(jpeg(1)) + 700] ^= 1  # only the zip's checksum can tell
    file.write_bytes(data)
    made = pack(zipped(file), tmp_path / "out", seed=0, shard_samples=5, progress=lambda *_: None, bad="skip")
    (listed,) = left_out_of(made)
    assert (listed["split"], listed["name"]) == ("train", "cat/1.jpg")
    assert listed["reason"] == "it does not match the checksum in its zip"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_images_are_unpacked_by_their_place(tmp_path, method):
    """Also behind a local header with more in it than the list has, and in a zip with something before it."""
    file = write_zip(tmp_path / "a.zip", CLASSES, method)
    file.write_bytes(b"#!/bin/sh\n" + file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        for name, _, data in images(zipped(file), "train"):
            assert data == archive.read(f"set/train/{name}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data, at: data[:at] + bytes(8) + data[at + 8 :], "it cannot be decompressed|its checksum|the checksum"),
        (lambda data, at: data[: at - 60] + b"x" * 60 + data[at:], "has no entry where its list says so"),
    ],
)
def test_damage_in_a_zip_is_a_bad_image(tmp_path, change, says):
    file = write_zip(tmp_path / "a.zip", CLASSES[:1] + CLASSES[6:7])
    with zipfile.ZipFile(file) as archive:
        at = archive.infolist()[1].header_offset + 30 + len(CLASSES[6])
    file.write_bytes(change(file.read_bytes(), at))
    with pytest.raises(BadImage, match=says):
        zipped(file).splits["val"][0].load()


@pytest.mark.parametrize(("name", "says"), [("lzma", "compressed by method 14"), ("encrypted", "encrypted")])
def test_zips_that_cannot_be_read_are_refused_at_once(tmp_path, name, says):
    file = write_zip(tmp_path / "a.zip", CLASSES, zipfile.ZIP_LZMA if name == "lzma" else zipfile.ZIP_STORED)
    if name == "encrypted":
        data = bytearray(file.read_bytes())
        data[data.index(b"PK\1\2") + 8] |= 1  # in the list
        file.write_bytes(data)
    with pytest.raises(DataError, match=rf"set/t.* in .*a\.zip is {says}; pack the zip again, stored or deflated"):
        zipped(file)


def test_the_job_says_which_folders_it_took(tmp_path, capsys):
    file = write_zip(tmp_path / "a.zip", CLASSES)
    assert job.main(["zip", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "training images from set/train/, validation images from set/test/" in capsys.readouterr().out


@pytest.mark.skipif(not CIFAR10_ZIP.exists(), reason="no CIFAR-10 on this machine (SKIPLANE_TEST_DATA)")
def test_cifar10_is_found_whole():
    source = zipped(CIFAR10_ZIP)
    assert source.classes[:3] == ("airplane", "automobile", "bird")
    assert {name: len(items) for name, items in source.splits.items()} == {"train": 50_000, "val": 10_000}
