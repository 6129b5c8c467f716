"""The streaming benchmark runs and writes what it prints; its servers give what they should and count it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from benchmarks.servers import CREDENTIALS, PIECE, Link, Server
from benchmarks.stream import OURS, WORKS
from pipelines.dataset import open_dataset
from pipelines.reader import Reader
from tests.datasets import make

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("packed") / "data")


@pytest.mark.slow
def test_it_measures_every_streamer(packed, tmp_path):
    file = tmp_path / "stream.json"
    command = [sys.executable, "-m", "benchmarks.stream", "--data", str(packed.root), "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    mosaic = bool(written["mosaicml_streaming"])
    assert ("left out" in done.stdout) != mosaic
    for work, streaming in WORKS.items():
        for kind in ("http", "s3"):
            rows = written["turns"][work][kind]
            assert list(rows) == [n for n in streaming if not n.startswith("MosaicML") or (mosaic and kind == "s3")]
            for cache in ("cold", "warm"):
                assert all(row[cache]["images_per_second"] > 0 < row[cache]["cpu_s_per_1000"] for row in rows.values())
                assert rows[OURS][cache]["our_rate_to_its"]["median"] == 1.0
            fetched = {name: row["fetched"] for name, row in rows.items()}
            # dataset.json and the index, and a quarter of a shard, are what comes on top of the tars
            assert 1.0 < fetched[OURS] < 1.5
            if work == "bytes":
                assert (fetched["webdataset"], fetched["webdataset, cache_dir"]) == (2.0, 1.0)


def counted(server, sent):
    """Whether so many bytes are counted: a server counts just after the client has them."""
    end = time.monotonic() + 10
    while server.sent != sent and time.monotonic() < end:
        time.sleep(0.01)
    return server.sent == sent


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_server_gives_what_is_in_its_folder_and_counts_it(kind, packed, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    tar = packed.splits["train"].shards[1]
    with Server(kind, packed.root) as server:
        dataset = open_dataset(server.url, server.endpoint)
        assert dataset.digest == packed.digest
        manifest = (packed.root / "dataset.json").stat().st_size
        assert counted(server, manifest)
        assert dataset.objects.sha256(dataset.locate(tar.name), tar.bytes) == tar.sha256
        assert counted(server, manifest + tar.bytes)
        assert dataset.objects.part(dataset.locate(tar.name), 512, 600) == _bytes(packed, tar.name)[512:600]
        assert counted(server, manifest + tar.bytes + 88)
        assert urlopen(f"{server.objects}/{tar.name}").read() == _bytes(packed, tar.name)


def test_the_file_server_reads_nothing_outside_its_folder(packed):
    with Server("http", packed.root) as server:
        for path in ("/../data-of-others", "/%2e%2e/x", "/", "/none.tar", "//etc/passwd"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(server.address + path)
        size = (packed.root / "train.index").stat().st_size
        with pytest.raises(HTTPError, match="416"):
            urlopen(Request(f"{server.address}/train.index", headers={"Range": f"bytes={size}-"}))
        ends = urlopen(Request(f"{server.address}/train.index", headers={"Range": f"bytes={size - 3}-{size + 100}"}))
        assert ends.headers["Content-Range"] == f"bytes {size - 3}-{size - 1}/{size}"
        assert ends.read() == _bytes(packed, "train.index")[-3:]


def test_a_link_is_shared_by_all_that_is_sent():
    link = Link(100.0)  # bytes a second
    assert link.due(50, now=10.0) == 10.5
    assert link.due(50, now=10.0) == 11.0  # behind the other one
    assert link.due(100, now=20.0) == 21.0  # it was idle meanwhile


def test_what_comes_through_a_link_is_the_same(tmp_path):
    data = bytes(range(256)) * (3 * PIECE // 256) + b"end"
    (tmp_path / "file").write_bytes(data)
    with Server("http", tmp_path, link=1000) as server:
        assert urlopen(f"{server.address}/file").read() == data
        part = Request(f"{server.address}/file", headers={"Range": f"bytes=10-{PIECE + 20}"})
        assert urlopen(part).read() == data[10 : PIECE + 21]
        assert counted(server, len(data) + PIECE + 11)


def test_a_server_ends_with_its_context(packed):
    with Server("http", packed.root) as server:
        pid = server.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_repeated_images_are_those_of_the_data(packed, tmp_path):
    from benchmarks.repeated import repeated

    many = repeated(packed.root, tmp_path / "many", 100, 30)
    assert many.splits["train"].counts == (30, 30, 30, 10)
    once, again = (Reader(d, "train").read(range(d.splits["train"].samples)).crc32 for d in (packed, many))
    counts = [sorted(again.tolist()).count(crc) for crc in once.tolist()]
    assert sorted(counts) == [2] * 20 + [3] * 20  # 100 of 40, from the first on
    assert len({shard.sha256 for shard in many.splits["train"].shards}) == 4


def _bytes(dataset, name):
    return (dataset.root / name).read_bytes()
