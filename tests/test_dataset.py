"""dataset.json, the index and the reader: what is refused, in which words, and what is read."""

import shutil
import zlib

import numpy as np
import pytest

from pipelines import shards as reading
from pipelines.dataset import open_dataset, verify
from pipelines.errors import DataError
from pipelines.index import BLOCK, RECORD
from pipelines.reader import Reader, joined
from tests.datasets import edit, make, overwrite, reopened, seal, source


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture
def dataset(packed, tmp_path):
    """A copy to damage."""
    shutil.copytree(packed.root, tmp_path / "data")
    return open_dataset(tmp_path / "data")


def test_a_record_is_24_bytes():
    assert RECORD.itemsize == 24


def test_what_was_packed_is_opened(packed):
    assert packed.classes == ("a", "b", "c", "d")
    assert packed.splits["train"].counts == (8, 8, 8, 8, 8)
    assert (packed.splits["train"].samples, packed.splits["val"].samples) == (40, 10)
    assert packed.splits["val"].counts == (8, 2)
    verify(packed, "sha256")


def test_the_digest_is_of_the_content_not_of_the_place(packed, dataset):
    assert dataset.root != packed.root
    assert dataset.digest == packed.digest
    assert len(packed.digest) == 64
    edit(dataset.root, made={"source": "elsewhere"})
    assert reopened(dataset).digest == packed.digest
    edit(dataset.root, classes=["a", "b", "d", "c"])
    assert reopened(dataset).digest != packed.digest


def damage(what):
    """name -> (what is done to a dataset's folder, the sentence that follows)"""
    return {
        "missing": (shutil.rmtree, "data does not exist; pack a dataset there"),
        "empty": (lambda root: (shutil.rmtree(root), root.mkdir()), r"data is empty; pack a dataset there"),
        "no manifest": (lambda root: (root / "dataset.json").unlink(), r"data has no dataset\.json; pack"),
        "not json": (lambda root: (root / "dataset.json").write_text("{"), "not a dataset's manifest"),
        "not a manifest": (lambda root: (root / "dataset.json").write_text("[1]"), "not a dataset's manifest"),
        "other format": (lambda root: edit(root, format=2), "format version 2; this Skiplane reads 1"),
        "no classes": (lambda root: edit(root, classes=None), "pack the dataset again"),
        "no splits": (lambda root: edit(root, splits={}), "no split 'train'"),
    }[what]


@pytest.mark.parametrize(
    "what", ["missing", "empty", "no manifest", "not json", "not a manifest", "other format", "no classes", "no splits"]
)
def test_what_is_no_dataset_is_refused(dataset, what):
    act, says = damage(what)
    act(dataset.root)
    with pytest.raises(DataError, match=says):
        open_dataset(dataset.root)


@pytest.mark.parametrize("name", ["../elsewhere.tar", "/etc/passwd", "a/b.tar", ".."])
def test_a_manifest_may_not_point_out_of_its_folder(dataset, name):
    import json

    splits = json.loads((dataset.root / "dataset.json").read_text())["splits"]
    splits["train"]["shards"][0]["name"] = name
    edit(dataset.root, splits=splits)
    with pytest.raises(DataError, match="only names inside the dataset's folder"):
        open_dataset(dataset.root)


def test_a_changed_or_missing_index_is_refused(dataset):
    index = dataset.root / "train.index"
    data = index.read_bytes()
    index.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"index .*train\.index does not match its checksum"):
        verify(dataset, "size")
    with pytest.raises(DataError, match=r"index .*train\.index does not match its checksum"):
        Reader(dataset, "train")
    index.unlink()
    with pytest.raises(DataError, match=r"train\.index is missing"):
        verify(dataset, "size")


@pytest.mark.parametrize("how", ["size", "sha256"])
def test_a_shard_that_changed_its_size_or_is_gone_is_named(dataset, how):
    shard = dataset.root / "train-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard .*train-000003\.tar has [\d,]+ bytes, dataset\.json says"):
        verify(dataset, how)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000003\.tar is missing"):
        verify(dataset, how)


def test_a_flipped_bit_is_found_by_the_hash(dataset):
    heard = []
    overwrite(dataset, "val", 1, b"\x00", index_too=False)
    verify(dataset, "size")
    with pytest.raises(DataError, match=r"val-000000\.tar does not match its checksum"):
        verify(dataset, "sha256", lambda shard, size: heard.append((shard, size)))
    assert [name for name, _ in heard] == [f"train-{i:06d}.tar" for i in range(5)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_reading_gives_the_bytes_that_were_packed(packed, threads, monkeypatch):
    monkeypatch.setattr(reading, "LEAST_PART", 1)
    by_key = {item.name: item for item in source().splits["train"]}
    ids = np.array([5, 39, 0, 5, 17, 21])
    with_threads = Reader(packed, "train", threads)
    batch = with_threads.read(ids)
    for row, sample in enumerate(ids):
        shard, key = with_threads.name(int(sample))
        item = by_key[key.split("-", 1)[1] + ".jpg"]
        data = item.load()
        assert batch.image(row).tobytes() == data
        assert (batch.labels[row], batch.crc32[row]) == (item.label, zlib.crc32(data))
        assert shard == f"train-{sample // 8:06d}.tar"
    assert batch.intact.all()
    assert batch.ids is ids or (batch.ids == ids).all()
    assert [i.tobytes() for i in batch.images()] == [batch.image(r).tobytes() for r in range(6)]
    with_threads.close()


def test_rows_and_joining_are_inverse(packed):
    batch = Reader(packed, "train").read(np.arange(7))
    again = joined([batch.row(i) for i in range(7)])
    for name in ("ids", "data", "offsets", "labels", "sizes", "crc32", "intact"):
        assert (getattr(again, name) == getattr(batch, name)).all()


def test_bytes_that_do_not_match_their_checksum_are_not_intact(dataset):
    overwrite(dataset, "train", 9, b"\0\0\0", index_too=False)
    assert Reader(dataset, "train").read(np.array([8, 9, 10])).intact.tolist() == [True, False, True]


def test_a_missing_and_a_short_shard_are_named(dataset):
    shard = dataset.root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[: 3 * BLOCK])
    (dataset.root / "train-000002.tar").unlink()
    reader = Reader(dataset, "train")
    assert reader.read(np.arange(8)).intact.all()
    with pytest.raises(DataError, match=r"train-000001\.tar ends before its index does"):
        reader.read(np.arange(8, 16))
    with pytest.raises(DataError, match=r"train-000002\.tar cannot be opened: No such file"):
        reader.read(np.arange(16, 24))


def test_few_shards_are_held_open(packed, monkeypatch):
    monkeypatch.setattr(reading, "MOST_OPEN", 1)
    reader = Reader(packed, "train")
    for sample in (0, 8, 16, 24, 32, 0):
        assert reader.read(np.array([sample])).intact.all()
        assert len(reader._shards._open) <= 2
    assert reader.read(np.arange(40)).intact.all()  # a batch may need them all at once
    reader.close()
    assert not reader._shards._open


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", "8"),
        ("samples", None),
        ("samples", 8.0),
        ("samples", True),
        ("samples", 0),
        ("samples", -8),
        ("samples", float("nan")),
        ("bytes", "1"),
        ("bytes", -1),
        ("bytes", 10**30),
        ("sha256", 7),
        ("sha256", "../../etc/passwd"),
        ("sha256", "A" * 64),
        ("name", 7),
        ("name", "a\nb.tar"),
        ("name", "a\0b.tar"),
    ],
)
def test_a_manifest_with_a_shard_that_is_none_is_refused(dataset, field, value):
    import json

    splits = json.loads((dataset.root / "dataset.json").read_text())["splits"]
    splits["train"]["shards"][0][field] = value
    edit(dataset.root, splits=splits)
    with pytest.raises(DataError, match=r"dataset\.json describes a shard as .*; pack the dataset again"):
        open_dataset(dataset.root)


def test_a_manifest_that_is_a_trap_is_refused(dataset):
    (dataset.root / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not a dataset's manifest"):
        open_dataset(dataset.root)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("shard", 99, "does not count the samples of its shards"),
        ("shard", 1, "does not count the samples of its shards"),
        ("label", 4, r"has labels outside 0 \.\. 3"),
        ("label", -1, r"has labels outside 0 \.\. 3"),
        ("block", 4_000_000_000, "points outside its shards"),
        ("size", 4_294_967_295, "points outside its shards"),
    ],
)
def test_an_index_that_was_written_wrong_is_refused(dataset, field, value, says):
    """Its hash is right: whoever wrote it was not."""
    path = dataset.root / "train.index"
    records = np.fromfile(path, RECORD)
    records[field][0] = value
    records.tofile(path)
    seal(dataset.root, "train", path)
    with pytest.raises(DataError, match=rf"index .*train\.index {says}"):
        Reader(reopened(dataset), "train")
