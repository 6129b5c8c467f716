"""Checking: exactly what cannot be trained on is left out, or refused, when it is packed and when it is verified."""

import json

import numpy as np
import pytest

from jobs import pack as job
from pipelines import checking
from pipelines.dali import Decoder, Refused
from pipelines.dataset import open_dataset, verify
from pipelines.errors import DataError
from pipelines.pack import left_out_of, pack, packed_alike
from pipelines.packing.packing import made_of
from pipelines.packing.run import Here
from pipelines.sources import BadImage, Item, Source
from pipelines.sources.folder import folder
from pipelines.verifying import check_images
from tests.datasets import edit, make, overwrite, reopened, source
from tests.jpegs import KINDS, jpeg
from tests.test_dali import batch, eval_geometry

SETTINGS = {"seed": 0, "shard_samples": 25, "progress": lambda *_: None}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Class folders: 60 sound JPEGs and 100 files of 12 kinds to train on, 10 JPEGs to validate."""
    root = tmp_path_factory.mktemp("odd")
    for split, count in (("train", 60), ("val", 10)):
        for seed in range(count):
            path = root / split / "ab"[seed % 2] / f"sound-{seed}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed))
    for seed in range(100):
        kind = list(KINDS)[seed % 12]
        (root / "train" / "ab"[seed % 2] / f"{kind}-{seed}.jpg").write_bytes(KINDS[kind][0](seed))
    return root


def undecodable(root) -> set[str]:
    """By name: what KINDS says of each file."""
    names = {path.relative_to(root / "train").as_posix() for path in (root / "train").glob("*/*.jpg")}
    return {name for name in names if "sound" not in name and not KINDS[name[2:].rsplit("-", 1)[0]][1]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_is_what_the_trainers_decoder_reads(kind):
    """Each kind by itself: the list of kinds, the check of the packer and the decoder of training agree."""
    make_bytes, decodes = KINDS[kind]
    item = Item(kind, 0, lambda: make_bytes(7))
    (found,) = checking.checked([item], threads=1)
    assert (not found.fault) == decodes
    size = (found.height or 8, found.width or 8)
    encoded, decoder = batch([make_bytes(7)], [size]), Decoder(8, "cpu", None, 1, 1)
    try:
        decoder.decode(encoded, eval_geometry(8, 8, [size]))
    except Refused:
        assert not decodes
    else:
        assert decodes
    finally:
        decoder.close()


def test_exactly_the_undecodable_are_left_out_and_listed(odd, tmp_path):
    made = pack(folder(odd / "train", odd / "val"), tmp_path / "out", **SETTINGS, bad="skip")
    listed = left_out_of(made)
    expected = undecodable(odd)
    assert len(expected) > 30
    assert {one["name"] for one in listed} == expected
    assert [one["name"] for one in listed] == sorted(expected)
    assert {one["split"] for one in listed} == {"train"}
    assert all(one["reason"] for one in listed)
    assert made.splits["train"].samples == 160 - len(expected)
    assert len(made.splits["train"].counts) == 7  # of 25 images each, less those that are left out
    verify(made, "sha256")
    check_images(made, lambda *_: None, Here(1))


def test_reasons_say_what_is_wrong(odd, tmp_path):
    made = pack(folder(odd / "train", odd / "val"), tmp_path / "out", **SETTINGS, bad="skip")
    reasons = {one["name"][2:].split("-")[0]: one["reason"] for one in left_out_of(made)}
    assert reasons["empty"] == "it is empty"
    assert reasons["text"] == "it is not an image"
    assert "truncated" in reasons["truncated"].lower()
    assert "the decoder refuses this GIF" in reasons["gif"]


def test_what_is_left_out_moves_nothing_else(odd, tmp_path):
    """The order of the others is that of packing everything: their labels follow each other as before."""
    images = folder(odd / "train", odd / "val")
    made = pack(images, tmp_path / "out", **SETTINGS, bad="skip")
    items = images.splits["train"]
    order = np.random.Philox(key=[0, len(items)]).random_raw(len(items)).argsort(kind="stable")
    kept = [items[i] for i in order if items[i].name not in undecodable(odd)]
    assert made.index("train")["label"].tolist() == [item.label for item in kept]
    assert made.index("train")["size"].tolist() == [len(item.load()) for item in kept]


def test_a_bad_image_is_refused_and_nothing_is_left(odd, tmp_path):
    with pytest.raises(DataError, match=r"\.jpg in train is not an image that can be decoded \(.+\); .* --bad skip"):
        pack(folder(odd / "train", odd / "val"), tmp_path / "out", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_the_same_source_is_known_again_with_what_it_left_out(odd, tmp_path):
    images = folder(odd / "train", odd / "val")
    made = pack(images, tmp_path / "out", **SETTINGS, bad="skip")
    known = made_of(images.made, 0, 25, None)
    assert packed_alike(known, tmp_path / "out", bad="skip") == made
    assert packed_alike(known, tmp_path / "out", bad="refuse") is None
    assert packed_alike(made_of(images.made, 1, 25, None), tmp_path / "out", bad="skip") is None
    whole = make(tmp_path / "whole")
    assert packed_alike(made_of(source().made, 0, 8, None), tmp_path / "whole", bad="skip") == whole


def test_the_job_prints_and_keeps_the_list(odd, tmp_path, capsys):
    flags = ["folder", "--train", str(odd / "train"), "--val", str(odd / "val"), "--out", str(tmp_path / "out")]
    with pytest.raises(DataError):
        job.main(flags)
    assert job.main([*flags, "--bad", "skip"]) == 0
    said = capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "dataset.json").read_text())["made"]
    assert f"left out {len(made['left_out'])} images" in said
    first = made["left_out"][0]
    assert f"  train  {first['name']}: {first['reason']}" in said
    assert job.main([*flags, "--bad", "skip"]) == 0
    assert "is packed already" in capsys.readouterr().out


def items(*loads):
    good = [Item(f"good-{i}", 0, lambda i=i: jpeg(i)) for i in range(3)]
    return Source(("a",), {"train": [*good, *(Item("odd", 0, load) for load in loads)], "val": good}, {})


def test_a_file_that_cannot_be_read_is_not_an_image_to_skip(tmp_path):
    with pytest.raises(DataError, match=r"odd cannot be read: No such file or directory; repair the source"):
        pack(items((tmp_path / "gone.jpg").read_bytes), tmp_path / "out", **SETTINGS, bad="skip")
    assert list(tmp_path.iterdir()) == []


def test_damage_that_the_source_finds_is_listed_too(tmp_path):
    def load():
        raise BadImage("bad checksum")

    made = pack(items(load), tmp_path / "out", **SETTINGS, bad="skip")
    assert left_out_of(made) == [{"split": "train", "name": "odd", "reason": "bad checksum"}]


def test_a_split_without_a_single_image_is_refused(tmp_path):
    nothing = Source(("a",), {"train": [Item("x", 0, lambda: b"x")], "val": []}, {})
    with pytest.raises(DataError, match="no image of train can be decoded"):
        pack(nothing, tmp_path / "out", **SETTINGS, bad="skip")


def test_few_images_are_held_at_once(monkeypatch):
    """Whatever the number of items: a group of them is loaded before its first comes out, and no more."""
    monkeypatch.setattr(checking, "MOST", 4)
    loaded = []
    endless = (Item(str(i), 0, lambda i=i: (loaded.append(i), jpeg(i % 5))[1]) for i in range(10**9))
    images = checking.checked(endless, threads=1)
    assert [next(images).item.name for _ in range(6)] == list("012345")
    assert len(loaded) <= 9
    images.close()


def test_large_images_are_decoded_in_smaller_groups(monkeypatch):
    monkeypatch.setattr(checking, "MOST_PIXELS", 10_000)
    images = [checking.Checked(Item("", 0, bytes), height=h, width=100) for h in (50, 40, 20, 300, 10, 0)]
    assert [[i.height for i in group] for group in checking._groups(images)] == [[50, 40], [20], [300], [10, 0]]


@pytest.fixture
def dataset(tmp_path):
    return make(tmp_path / "data")


def test_verify_tells_what_it_checked(dataset, capsys):
    assert job.main(["verify", str(dataset.root)]) == 0
    assert "every shard matches its checksum: 4 classes, 40 train in 5 shards" in capsys.readouterr().out
    assert job.main(["verify", str(dataset.root), "--decode"]) == 0
    assert "every image its own, and decodes" in capsys.readouterr().out


def test_verify_finds_a_changed_byte(dataset):
    overwrite(dataset, "val", 1, b"\0", index_too=False)
    with pytest.raises(DataError, match=r"val-000000\.tar does not match its checksum") as caught:
        job.main(["verify", str(dataset.root)])
    assert caught.value.exit_code == 3


def test_decoding_finds_what_hashes_cannot(dataset):
    """Bytes that were sealed as they are: truncated, of another size, and an index of other bytes."""
    overwrite(dataset, "train", 3, jpeg(1)[:-40])
    overwrite(dataset, "train", 20, jpeg(1, 8, 8))
    overwrite(dataset, "val", 2, b"\0", index_too=False)
    with pytest.raises(DataError) as caught:
        check_images(reopened(dataset), lambda *_: None, Here(1))
    lines = str(caught.value).splitlines()
    assert [line.split("-")[0] for line in lines[:3]] == ["00000003", "00000020", "00000002"]
    assert "in train-000000.tar cannot be trained on: image file is truncated" in lines[0]
    assert "in train-000002.tar cannot be trained on: its size is not the index's" in lines[1]
    assert "in val-000000.tar cannot be trained on: its bytes do not match their checksum" in lines[2]
    assert lines[3].startswith("3 bad images in ")


def test_verify_of_what_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match="does not exist; pack a dataset there"):
        job.main(["verify", str(tmp_path / "none")])


def test_a_dataset_of_before_still_opens(dataset):
    edit(dataset.root, made={"source": "test", "shuffle_seed": 0, "shard_samples": 8})
    assert left_out_of(open_dataset(dataset.root)) == []
