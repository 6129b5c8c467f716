"""Datasets over HTTP and S3: what a folder holds is opened, verified and told of alike wherever it lies."""

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from pipelines import dataset as datasets
from pipelines.dataset import open_dataset, verify
from pipelines.errors import DataError
from pipelines.remote import objects as reading
from pipelines.remote.objects import Objects
from pipelines.remote.patience import Patience
from tests import faults
from tests.datasets import edit, make
from tests.faults import ACCESS_DENIED, Cut, Flip, Html, Status, always, each, first
from tests.servers import FileServer, S3Server

SHARD = "train-000003.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture(scope="module")
def http(packed):
    with FileServer(packed.root) as server:
        yield server


@pytest.fixture(scope="module")
def s3(packed):
    with S3Server(packed.root) as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def server(request):
    """That has the packed dataset, and behaves until it is told otherwise."""
    server = request.getfixturevalue(request.param)
    server.behave()
    return server


@pytest.fixture
def remote(server):
    """The dataset there; what fails is tried again at once, up to three times."""
    opened = open_dataset(server.url, server.endpoint)
    server.behave()
    return replace(opened, objects=impatient(server))


def impatient(server) -> Objects:
    """On a clock that stands still."""
    return Objects(server.endpoint, Patience(1.0, clock=lambda: 0.0, sleep=lambda _: None))


def at_once(server) -> Objects:
    """Fails at the first failure."""
    return Objects(server.endpoint, Patience(0.0))


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """Of the dataset's folder, to damage."""
    return shutil.copytree(packed.root, tmp_path / "data")


def renamed(root: Path, shard, index=lambda name: name) -> None:
    """Rewrites the names in a manifest."""
    splits = json.loads((root / "dataset.json").read_text())["splits"]
    for split in splits.values():
        split["index"] = index(split["index"])
        for part in split["shards"]:
            part["name"] = shard(part["name"])
    edit(root, splits=splits)


def test_what_is_on_a_server_is_what_is_in_the_folder(remote, packed):
    assert (remote.classes, remote.splits, remote.made) == (packed.classes, packed.splits, packed.made)
    assert remote.digest == packed.digest
    assert remote.streamed
    assert not packed.streamed
    for split in ("train", "val"):
        assert (remote.index(split) == packed.index(split)).all()


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_a_slash_at_the_end_of_the_place_changes_nothing(server, packed, end):
    dataset = open_dataset(server.url + end, server.endpoint)
    assert dataset.digest == packed.digest
    assert dataset.locate(SHARD) == f"{server.url}/{SHARD}"
    verify(dataset, "size")


def test_verifying_hears_of_each_shard_and_reads_only_what_it_must(remote, server, packed):
    heard = []
    shards = [(s.name, s.bytes) for split in packed.splits.values() for s in split.shards]
    verify(remote, "size", lambda *shard: heard.append(shard))
    assert heard == shards
    names = [name for name, _ in shards] + [split.index for split in packed.splits.values()]
    assert sorted((r.method, r.path) for r in server.log) == sorted(("HEAD", name) for name in names)
    heard.clear()
    verify(remote, "sha256", lambda *shard: heard.append(shard))
    assert heard == shards
    assert sum(server.sent(name) for name, _ in shards) == sum(size for _, size in shards)


def test_a_large_object_is_read_in_parts(server, packed, monkeypatch):
    monkeypatch.setattr(reading, "RANGE", 1000)
    where, data = f"{server.url}/{SHARD}", (packed.root / SHARD).read_bytes()
    objects = at_once(server)
    parts = list(objects.parts(where, len(data)))
    assert b"".join(parts) == data
    assert {len(part) for part in parts[:-1]} == {1000}
    assert [(r.begin, r.end) for r in server.log] == [
        (begin, min(begin + 1000, len(data))) for begin in range(0, len(data), 1000)
    ]
    assert objects.sha256(where, len(data)) == hashlib.sha256(data).hexdigest()
    assert list(objects.parts(where, 0)) == []


def test_files_are_read_as_objects_are(packed, monkeypatch):
    monkeypatch.setattr(reading, "RANGE", 1000)
    where, data = str(packed.root / SHARD), (packed.root / SHARD).read_bytes()
    objects = Objects()
    assert (objects.size(where), objects.read(where)) == (len(data), data)
    assert objects.part(where, 3, 2000) == data[3:2000]
    assert b"".join(objects.parts(where, len(data))) == data
    with pytest.raises(DataError, match=rf"{SHARD} ends after {len(data):,} bytes, before {len(data) + 1:,}"):
        objects.part(where, 10, len(data) + 1)
    for act in (objects.size, objects.read, partial(objects.part, begin=0, end=1)):
        with pytest.raises(DataError, match=r"/no\.tar (is missing|cannot be read: No such file or directory)$"):
            act(str(packed.root / "no.tar"))


def test_a_server_without_ranges_serves_a_dataset(remote, server, packed):
    server.fault = always(faults.NoRanges())
    verify(remote, "sha256")
    assert (remote.index("train") == packed.index("train")).all()
    remote.objects.touch(remote.locate(SHARD))


def test_a_wrong_bit_from_a_server_without_ranges_is_found(remote, server):
    server.fault = always(Html(), SHARD, "GET")
    with pytest.raises(DataError, match=rf"shard {server.url}/{SHARD} does not match its checksum in dataset\.json"):
        verify(remote, "sha256")


@pytest.mark.parametrize("fault", [Status(503), Cut(0), Cut(700)], ids=str)
def test_what_passes_is_waited_for(server, packed, fault):
    """At the pauses of the product, on the wall clock."""
    server.fault = first(1, fault)
    dataset = open_dataset(server.url, server.endpoint)
    assert dataset.digest == packed.digest
    assert [r.path for r in server.log] == ["dataset.json"] * 2


def test_what_fails_everywhere_once_is_right_in_the_end(remote, server):
    server.fault = each(first(1, Cut(700)), first(2, Status(503), method="HEAD"))
    verify(remote, "sha256")


def test_what_never_passes_is_told_with_how_long_it_was_tried(remote, server):
    server.fault = always(Status(503), SHARD)
    says = rf"^{server.url}/{SHARD} cannot be found: 503 Service Unavailable, tried for 1 s"
    with pytest.raises(DataError, match=says):
        verify(remote, "size")
    assert [r.method for r in server.log if r.path == SHARD] == ["HEAD"] * (1 + 3)


@pytest.mark.parametrize("how", ["size", "sha256"])
def test_a_shard_that_is_not_on_the_server_is_named_before_anything_is_read(remote, server, how):
    server.fault = always(Status(404), SHARD)
    with pytest.raises(DataError, match=rf"^{server.url}/{SHARD} cannot be found: 404 Not Found$"):
        verify(remote, how)
    assert not server.sent(SHARD)
    assert not server.sent("train-000000.tar")


@pytest.mark.parametrize(("kind", "how"), [(FileServer, "size"), (FileServer, "sha256"), (S3Server, "size")])
def test_a_short_shard_and_a_short_index_are_named(copy, kind, how):
    shard, index = copy / SHARD, copy / "val.index"
    shard.write_bytes(shard.read_bytes()[:-512])
    with kind(copy) as server:
        dataset = open_dataset(server.url, server.endpoint)
        says = rf"^shard {server.url}/{SHARD} has [\d,]+ bytes, dataset\.json says [\d,]+; copy or pack the dataset"
        with pytest.raises(DataError, match=says):
            verify(dataset, how)
    index.write_bytes(index.read_bytes()[:-24])
    with FileServer(copy) as server:
        says = {"size": r"has 216 bytes, dataset\.json says 240", "sha256": "does not match its checksum"}
        with pytest.raises(DataError, match=rf"^index {server.url}/val\.index {says[how]}"):
            verify(open_dataset(server.url), how)


@pytest.mark.parametrize(("name", "what"), [(SHARD, "shard"), ("train.index", "index")])
def test_a_flipped_bit_is_found_by_the_hash(remote, server, name, what):
    server.fault = always(Flip(1000 if what == "shard" else 5), name)
    verify(remote, "size")
    with pytest.raises(DataError, match=rf"^{what} {server.url}/{name} does not match its checksum in dataset\.json; "):
        verify(remote, "sha256")


def test_a_wrong_index_is_never_handed_out(remote, server):
    for fault in (Flip(5), Html()):
        server.fault = always(fault, "train.index")
        with pytest.raises(DataError, match=rf"^index {server.url}/train\.index does not match its checksum"):
            remote.index("train")


def test_an_index_of_another_number_of_samples_is_refused(copy):
    splits = json.loads((copy / "dataset.json").read_text())["splits"]
    splits["val"]["shards"][0]["samples"] += 1
    edit(copy, splits=splits)
    with FileServer(copy) as server:
        dataset = open_dataset(server.url)
        with pytest.raises(DataError, match=rf"^index {server.url}/val\.index has 10 records for 11 samples"):
            dataset.index("val")
        with pytest.raises(DataError, match=r"val\.index has 240 bytes, dataset\.json says 264"):
            verify(dataset, "size")


def test_who_may_not_read_is_told_what_is_needed(server):
    server.fault = always(ACCESS_DENIED)
    with pytest.raises(
        DataError, match=r"^\S+/dataset\.json cannot be read: 403 Forbidden \(AccessDenied\); the env"
    ) as e:
        open_dataset(server.url, server.endpoint)
    assert "AWS_*" in str(e.value)
    assert "\n" not in str(e.value)


def test_what_is_no_dataset_on_a_server_is_refused(server, packed):
    with pytest.raises(DataError, match=rf"^{server.url}/no/dataset\.json cannot be read: 404 Not Found[^\n]*$"):
        open_dataset(f"{server.url}/no", server.endpoint)
    server.fault = always(Html(), "dataset.json")
    with pytest.raises(DataError, match=rf"^{server.url}/dataset\.json is not a dataset's manifest: JSONDecodeError"):
        open_dataset(server.url, server.endpoint)


@pytest.mark.parametrize("url", ["ftp://host/data", "https://host/data?sig=1", "s3:///data"])
def test_a_place_that_is_no_url_we_read_is_a_sentence(url):
    with pytest.raises(DataError, match=r"^'.*/dataset\.json' is not a URL of s3://, gs://, az://, http://, https://"):
        open_dataset(url)


def test_a_name_is_located_beside_the_manifest_and_a_url_where_it_says(packed):
    for place, name, at in [
        ("/data/in", "a b%.tar", "/data/in/a b%.tar"),
        ("/data/in/", "a.tar", "/data/in/a.tar"),
        ("s3://bucket/in", "a b%.tar", "s3://bucket/in/a b%.tar"),
        ("http://host/in", "a b%20#?.tar", "http://host/in/a%20b%2520%23%3F.tar"),
        ("/data/in", "file:///else/a%20b.tar", "/else/a b.tar"),
        ("/data/in", "s3://other/a.tar", "s3://other/a.tar"),
        ("s3://bucket/in", "https://host/a.tar", "https://host/a.tar"),
    ]:
        assert replace(packed, place=place).locate(name) == at


def test_plain_names_of_any_letters_are_found_on_a_server(copy):
    odd = {f"train-{i:06d}.tar": name for i, name in enumerate(["a b.tar", "50%.tar", "%20.tar", "#1?.tar", "ü.tar"])}
    for old, new in odd.items():
        (copy / old).rename(copy / new)
    renamed(copy, lambda name: odd.get(name, name))
    with FileServer(copy) as server:
        verify(open_dataset(server.url), "sha256")
    verify(open_dataset(copy), "sha256")


def test_each_client_is_probed_once(packed, tmp_path):
    root = str(packed.root)
    assert [Path(at).parent for at in packed.probes()] == [packed.root]
    names = iter(["s3://one/a.tar", "s3://one/b/c.tar", "s3://two/a.tar", "http://host:1/a.tar", "file:///else/a.tar"])
    split = packed.splits["train"]
    shards = tuple(replace(shard, name=name) for shard, name in zip(split.shards, names, strict=True))
    mixed = replace(packed, splits={**packed.splits, "train": replace(split, shards=shards)})
    clients = ["s3://one/", "s3://two/", "http://host:1/", "/else/", f"{root}/"]
    assert len(mixed.probes()) == len(clients)
    assert all(sum(at.startswith(client) for at in mixed.probes()) == 1 for client in clients)
    assert mixed.streamed


def test_shards_may_lie_on_servers_and_the_digest_stays(packed, copy, server):
    for shard in copy.glob("*.tar"):
        shard.unlink()
    renamed(copy, lambda name: f"{server.url}/{quote(name)}")
    dataset = open_dataset(copy, server.endpoint)
    assert dataset.digest == packed.digest
    assert dataset.streamed
    verify(dataset, "sha256")
    assert {r.path for r in server.log} == {shard.name for split in packed.splits.values() for shard in split.shards}


def test_shards_may_lie_elsewhere_on_this_machine(packed, copy, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for shard in copy.glob("*.tar"):
        shard.rename(elsewhere / shard.name)
    renamed(copy, lambda name: (elsewhere / name).as_uri())
    dataset = open_dataset(copy)
    assert (dataset.digest, dataset.streamed) == (packed.digest, False)
    verify(dataset, "sha256")
    (elsewhere / SHARD).unlink()
    with pytest.raises(DataError, match=rf"^{elsewhere}/{SHARD} is missing$"):
        verify(dataset, "size")


@pytest.mark.parametrize(
    "name",
    ["file:///etc/passwd", "file://host/a.tar", "../a.tar", "/etc/passwd", "", "..", "a/b.tar", "ftp://host/a.tar",
     "http://host", "s3://bucket/a.tar?sig=1", "https://host/a.tar#part"],
)  # fmt: skip
def test_a_manifest_from_a_server_names_no_file_of_this_machine(copy, name):
    renamed(copy, lambda _: name)
    with FileServer(copy) as server, pytest.raises(DataError, match=r"^dataset\.json names the shard '.*'; only names"):
        open_dataset(server.url)
    if not name.startswith("file:///"):  # a local manifest may
        with pytest.raises(DataError, match=r"^dataset\.json names the shard"):
            open_dataset(copy)


@pytest.mark.parametrize("name", ["file:///etc/passwd", "http://host/train.index", "../train.index", ""])
def test_an_index_lies_beside_its_manifest(copy, name):
    renamed(copy, lambda name: name, index=lambda _: name)
    with pytest.raises(
        DataError, match=r"^dataset\.json names the index '.*'; only names inside its folder are allowed"
    ):
        open_dataset(copy)


def test_sizes_are_asked_for_at_once(remote, server, monkeypatch):
    """All requests of a verification can be in flight together: each waits for the others."""
    count = sum(len(split.shards) + 1 for split in remote.splits.values())
    together = threading.Barrier(count, timeout=60)
    monkeypatch.setattr(datasets, "ASKED_AT_ONCE", count)
    server.fault = lambda *_: together.wait() and None
    verify(remote, "size")


def test_touching_reads_a_byte(server):
    objects = at_once(server)
    objects.touch(f"{server.url}/{SHARD}")
    assert [(r.method, r.begin, r.end) for r in server.log] == [("HEAD", None, None), ("GET", 0, 1)]
    server.fault = always(ACCESS_DENIED, SHARD, "GET")  # may be looked at, not read
    with pytest.raises(DataError, match=r"403 Forbidden \(AccessDenied\); the environment of this process"):
        objects.touch(f"{server.url}/{SHARD}")


def test_touching_what_is_empty_reads_nothing(tmp_path):
    (tmp_path / "empty").touch()
    with FileServer(tmp_path) as server:
        at_once(server).touch(f"{server.url}/empty")
        assert [r.method for r in server.log] == ["HEAD"]
