"""Packing into a bucket, adopting tars that lie in one or on a web server, and looking at datasets there."""

from pathlib import Path

import pytest

from jobs import pack as job
from pipelines.dataset import open_dataset
from pipelines.errors import ClusterError, ConfigError, DataError
from pipelines.pack import pack
from pipelines.packing.target import Target
from pipelines.packing.unfinished import Unfinished
from pipelines.remote.store import Store
from tests.datasets import make, overwrite, source
from tests.faults import ACCESS_DENIED, Cut, Status, always, first
from tests.jpegs import jpeg
from tests.servers import FileServer, S3Server

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
SETTINGS = {"seed": 0, "shard_samples": 8, "progress": lambda *_: None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "data")


@pytest.fixture
def bucket():
    with S3Server() as server:
        yield server


@pytest.fixture
def shelf(whole):
    """A bucket with the tars of a dataset, and nothing else of it."""
    with S3Server(whole.root) as server:
        store = Store(server.url, server.endpoint)
        for name in ("dataset.json", "train.index", "val.index"):
            store.remove(name)
        yield server


def contents(server: S3Server, place: str = "") -> dict[str, bytes]:
    store = Store(server.url, server.endpoint)
    return {name: store.read(name) for name in store.names(place)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(server: S3Server, **settings):
    return pack(source(), f"{server.url}/data", endpoint=server.endpoint, **SETTINGS | settings)


def interrupt(_, done, __):
    if done == 20:
        raise KeyboardInterrupt


def test_a_bucket_gets_what_a_folder_gets(bucket, whole):
    made = put(bucket)
    assert made.digest == whole.digest
    assert contents(bucket) == {f"data/{name}": data for name, data in files(whole.root).items()}


def test_what_was_cut_short_in_a_bucket_goes_on(bucket, whole):
    with pytest.raises(KeyboardInterrupt):
        put(bucket, progress=interrupt)
    done = {"data/.packing/plan.json", "data/.packing/train-000000.done", "data/.packing/train-000001.done"}
    assert set(contents(bucket)) == {*done, "data/train-000000.tar", "data/train-000001.tar"}
    with pytest.raises(DataError, match=r"data is being packed, or packing was cut short; give the jobs\.pack command"):
        open_dataset(f"{bucket.url}/data", bucket.endpoint)
    with pytest.raises(ConfigError, match=r"begun in another way \(shuffle_seed was 0, is 1\)"):
        put(bucket, seed=1)
    Store(bucket.url, bucket.endpoint).write("data/train-000001.tar", b"overwritten")
    heard = []
    put(bucket, going_on=lambda *found: heard.append(found))
    assert heard == [(1, 7)]
    assert contents(bucket) == {f"data/{name}": data for name, data in files(whole.root).items()}


def test_an_end_before_the_first_shard_leaves_nothing(bucket):
    bad = source()
    bad.splits["train"][0] = type(bad.splits["train"][0])("bad", 0, lambda: b"x")
    with pytest.raises(DataError, match="bad in train is not an image"):
        pack(bad, f"{bucket.url}/data", endpoint=bucket.endpoint, **SETTINGS | {"shard_samples": 40})
    assert contents(bucket) == {}


def test_a_bucket_that_holds_something_else(bucket):
    Store(bucket.url, bucket.endpoint).write("data/thesis.txt", b"")
    with pytest.raises(ConfigError, match=r"--out s3://.*/data holds something else; name a new folder"):
        put(bucket)
    assert set(contents(bucket)) == {"data/thesis.txt"}


def test_two_that_begin_at_once_in_a_bucket(bucket, monkeypatch):
    """Both found it empty; the plan is there once."""
    Store(bucket.url, bucket.endpoint).write("data/.packing/plan.json", b"{}")
    monkeypatch.setattr(Unfinished, "_begun", lambda _: None)
    with pytest.raises(ConfigError, match="is being packed by another process; wait for it, or name another"):
        put(bucket)
    assert contents(bucket) == {"data/.packing/plan.json": b"{}"}


def test_a_server_that_fails_for_a_moment_is_asked_again(bucket, whole):
    bucket.fault = first(2, Status(503), "data/train-000001.tar", "PUT")
    assert put(bucket).digest == whole.digest
    assert sum(r.method == "PUT" and r.path == "data/train-000001.tar" for r in bucket.log) == 3


def test_a_large_tar_goes_in_parts(bucket):
    """And what was not kept is not there."""
    target, data = Target(f"{bucket.url}/data", bucket.endpoint), bytes(range(256)) * 50_000
    for name in ("kept.tar", "not.tar"):
        with target.staged(name) as staged:
            staged.file.write(data)
            if name == "kept.tar":
                staged.keep()
    assert contents(bucket) == {"data/kept.tar": data}
    assert any(request.method == "POST" for request in bucket.log)


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (ACCESS_DENIED, ConfigError, r"--out: s3://.*train-000002\.tar cannot be written: 403 .*credentials"),
        (Status(500), ClusterError, r"--out: s3://.*train-000002\.tar cannot be written: 500 "),
    ],
)
def test_a_server_that_refuses_in_the_middle_is_a_sentence_and_packing_goes_on(
    bucket, whole, monkeypatch, fault, kind, says
):
    monkeypatch.setattr("pipelines.packing.target.ASKING_S", 0.5)
    bucket.fault = always(fault, "data/train-000002.tar")
    with pytest.raises(kind, match=f"{says}.*; 2 of 7 shards are done and kept: the same command goes on"):
        put(bucket)
    bucket.behave()
    assert put(bucket).digest == whole.digest


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(ConfigError, match=r"--out: s3://no-such-bucket/data.* cannot be .*NoSuchBucket"):
        pack(source(), "s3://no-such-bucket/data", endpoint=bucket.endpoint, **SETTINGS)


def test_a_web_server_is_no_place_to_pack(tmp_path):
    with pytest.raises(ConfigError, match=r"--out is http://x/y; a folder, or a URL of s3://, gs://, az:// is needed"):
        job.main(["digits", "--out", "http://x/y"])


def test_the_command_packs_verifies_and_tells_of_a_bucket(bucket, tmp_path, capsys):
    there = ["--endpoint", bucket.endpoint]
    assert job.main(["digits", "--out", f"{bucket.url}/digits", *there]) == 0
    assert job.main(["digits", "--out", f"{bucket.url}/digits", *there]) == 0
    assert f"{bucket.url}/digits is packed already" in capsys.readouterr().out
    assert job.main(["verify", f"{bucket.url}/digits", *there]) == 0
    assert job.main(["verify", f"{bucket.url}/digits", "--decode", *there]) == 0
    assert capsys.readouterr().out.count("is whole") == 2
    assert job.main(["info", f"{bucket.url}/digits", *there, "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert f"dataset     {bucket.url}/digits" in capsys.readouterr().out
    assert job.main(["digits", "--out", str(tmp_path / "digits")]) == 0
    job.main(["info", str(tmp_path / "digits"), "--sheet", str(tmp_path / "local.png")])
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "local.png").read_bytes()


def test_each_shard_is_read_once_to_verify_it(bucket, whole):
    put(bucket)
    bucket.behave()
    assert job.main(["verify", f"{bucket.url}/data", "--decode", "--endpoint", bucket.endpoint]) == 0
    for shard in whole.splits["train"].shards:
        assert bucket.sent(f"data/{shard.name}") == shard.bytes


def test_a_changed_byte_behind_a_url_is_found(tmp_path, capsys):
    overwrite(make(tmp_path / "data"), "val", 1, b"\0", index_too=False)
    with FileServer(tmp_path / "data") as server:
        for flags in ([], ["--decode"]):
            with pytest.raises(DataError, match=r"http://.*val-000000\.tar does not match its checksum"):
                job.main(["verify", server.url, *flags])


# -- tars that lie there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train-{000000..000004}.tar", "train-*.tar", "train-00000[0-4].tar"])
def test_tars_in_a_bucket_are_adopted(shelf, whole, tmp_path, train):
    flags = ["--train", f"{shelf.url}/{train}", "--val", f"{shelf.url}/val-*.tar", "--endpoint", shelf.endpoint]
    before = contents(shelf)
    assert job.main(["tars", *flags, "--out", str(tmp_path / "out")]) == 0
    made = open_dataset(tmp_path / "out", shelf.endpoint)
    names = [f"{shelf.url}/train-{i:06d}.tar" for i in range(5)]
    assert [shard.name for shard in made.splits["train"].shards] == names
    assert made.index("train").tobytes() == whole.index("train").tobytes()
    assert contents(shelf) == before
    assert not any(request.method == "PUT" for request in shelf.log)
    assert job.main(["verify", str(tmp_path / "out"), "--decode", "--endpoint", shelf.endpoint]) == 0


def test_tars_in_the_datasets_own_place_are_named_without_it(shelf, whole):
    flags = ["--train", f"{shelf.url}/train-*.tar", "--val", f"{shelf.url}/val-*.tar", "--endpoint", shelf.endpoint]
    before = contents(shelf)
    assert job.main(["tars", *flags, "--out", shelf.url]) == 0
    made = open_dataset(shelf.url, shelf.endpoint)
    assert [shard.name for shard in made.splits["val"].shards] == ["val-000000.tar", "val-000001.tar"]
    assert contents(shelf).keys() - before.keys() == {"dataset.json", "train.index", "val.index"}


def test_tars_on_a_web_server_are_adopted_though_it_cuts_connections(whole, tmp_path):
    with FileServer(whole.root) as server:
        server.fault = first(1, Cut(1000))
        flags = ["--train", f"{server.url}/train-{{000000..000004}}.tar", "--val", f"{server.url}/val-00000{{0,1}}.tar"]
        assert job.main(["tars", *flags, "--out", str(tmp_path / "out")]) == 0
        assert open_dataset(tmp_path / "out").index("val").tobytes() == whole.index("val").tobytes()


def test_a_tar_that_is_not_there(shelf, tmp_path):
    flags = ["--train", f"{shelf.url}/train-00000{{0..5}}.tar", "--val", f"{shelf.url}/val-*.tar"]
    with pytest.raises(DataError, match=r"train-000005\.tar cannot be found: 404"):
        job.main(["tars", *flags, "--endpoint", shelf.endpoint, "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"--train is .*, which names no tar that is there"):
        job.main(["tars", "--train", f"{shelf.url}/x-*.tar", *flags[2:], "--endpoint", shelf.endpoint, "--out", "x"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_pack_into_a_bucket(bucket, whole, tmp_path, capsys):
    for i in range(12):
        for split in ("train", "val"):
            path = tmp_path / "in" / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
    flags = ["folder", "--train", str(tmp_path / "in" / "train"), "--val", str(tmp_path / "in" / "val")]
    flags += ["--shard-samples", "3"]
    there = ["--out", f"{bucket.url}/data", "--endpoint", bucket.endpoint]
    assert job.main([*flags, *there, "--workers", "2"]) == 0
    assert "packing with 2 processes" in capsys.readouterr().out
    assert job.main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert contents(bucket) == {f"data/{name}": data for name, data in files(tmp_path / "out").items()}
    assert job.main(["verify", there[1], "--decode", *there[2:], "--workers", "2"]) == 0
