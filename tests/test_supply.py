"""Streaming from servers that misbehave: right data or a clear error, each shard once, never a short epoch."""

import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest

from pipelines.dataset import open_dataset
from pipelines.errors import DataError
from pipelines.order import Order
from pipelines.reader import Reader
from pipelines.remote.cache import Cache, Entry
from pipelines.remote.needs import InOrder, Needs
from pipelines.remote.patience import Patience
from pipelines.remote.store import Store
from pipelines.remote.supply import How, Supply
from pipelines.remote.transfer import Counter as Counted
from pipelines.remote.transfer import Fetched, Reads, Transfer
from tests.datasets import make, overwrite, reopened
from tests.faults import Cut, Flip, Html, NoRanges, Stall, Status, always, first
from tests.servers import FileServer, S3Server

LANES, EPOCHS = 4, 3
SERVERS = {"http": FileServer, "s3": S3Server}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture(params=SERVERS)
def server(request, packed):
    with SERVERS[request.param](packed.root) as running:
        yield running


def order_of(dataset, window=2):
    return Order(dataset.splits["train"].counts, seed=0, streams=2, lanes=LANES, micro_batch=2, window=window)


@contextmanager
def supplied(server, cache, said=None, lanes=range(LANES), **how):
    """A supply of what the server has. How patient it is does not matter to those who get what they ask for."""
    dataset = open_dataset(server.url, server.endpoint)
    needs = Needs(order_of(dataset), lanes, val=range(len(dataset.splits["val"].shards)), epochs=EPOCHS)
    how = {"wait_s": 20.0, "request_s": 5.0} | how
    supply = Supply(dataset, cache, needs, How(**how), (lambda _: None) if said is None else said.append)
    try:
        yield supply
    finally:
        supply.close()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", cap=10**9)


def read_all(supply, packed, epochs=EPOCHS, lanes=range(LANES)):
    """Reads every epoch and every validation image through the supply; fails where a byte is not what was packed."""
    order, local = order_of(packed), {name: Reader(packed, name) for name in packed.splits}
    readers = {name: supply.reader(name, 2) for name in packed.splits}
    try:
        for step in range(epochs * order.steps_per_epoch):
            ids = order.ids(*divmod(step, order.steps_per_epoch), lanes).ravel()
            same(readers["train"].read(ids), local["train"].read(ids))
            supply.at(step)
        same(readers["val"].read(range(10)), local["val"].read(range(10)))
    finally:
        for reader in (*readers.values(), *local.values()):
            reader.close()


def same(got, wanted):
    assert got.intact.all()
    assert (got.data == wanted.data).all()
    assert (got.labels == wanted.labels).all()
    assert (got.crc32 == wanted.crc32).all()


def whole(server, dataset):
    """How often each shard was asked for from its first to its last byte."""
    sizes = {shard.name: shard.bytes for split in dataset.splits.values() for shard in split.shards}
    return Counter(r.path for r in server.log if r.method == "GET" and r.begin is None and r.path in sizes)


def test_all_epochs_are_right_and_each_shard_is_fetched_once(server, packed, cache):
    with supplied(server, cache) as supply:
        read_all(supply, packed)
        fetched, first = supply.fetched, supply.reads
    names = [shard.name for split in packed.splits.values() for shard in split.shards]
    assert whole(server, packed) == dict.fromkeys(names, 1)
    sizes = sum(path.stat().st_size for path in packed.root.iterdir()) - (packed.root / "dataset.json").stat().st_size
    assert (fetched.shards, fetched.shard_bytes, fetched.retries) == (len(names), sizes, 0)
    server.behave()
    with supplied(server, cache) as supply:  # another run
        read_all(supply, packed)
        assert (supply.fetched, supply.reads) == (Fetched(), Reads(first.hits + first.misses, 0))
    assert {r.path for r in server.log} == {"dataset.json"}


def test_a_sample_is_read_by_range_where_its_shard_has_not_arrived(server, packed, cache):
    """Whole shards do not come at all here: nobody leads."""
    with supplied(server, cache, leads=False) as supply, _closing(supply.reader("train", 2)) as reader:
        same(reader.read([3]), Reader(packed, "train").read([3]))
        size = int(packed.index("train")["size"][3])
        assert (supply.fetched.samples, supply.fetched.sample_bytes, supply.fetched.shards) == (1, size, 0)
        for _ in range(20):  # a quarter of a shard may be read so; then it is fetched, once
            same(reader.read([3]), Reader(packed, "train").read([3]))
        assert supply.fetched.shards == 1
        assert supply.reads == Reads(hits=20 - supply.fetched.samples, misses=supply.fetched.samples + 1)
        assert supply.fetched.sample_bytes <= packed.splits["train"].shards[0].bytes / 4
    assert sum(whole(server, packed).values()) == 1


@contextmanager
def _closing(reader):
    try:
        yield reader
    finally:
        reader.close()


def test_a_node_asks_only_for_the_shards_of_its_streams(server, packed, cache):
    order = order_of(packed)
    lanes = [lane for lane in range(LANES) if order.stream_of(lane) == 0]
    with supplied(server, cache, lanes=lanes) as supply:
        read_all(supply, packed, lanes=lanes)
    own = {f"train-{order.shard_of(begin):06d}.tar" for begin, _ in order.pieces[0]}
    assert {r.path for r in server.log if r.path.startswith("train-")} == own
    assert len(own) < len(packed.splits["train"].shards)


QUIET = ("a page of HTML", "a flipped bit", "cut")  # told by hashes, or gone on with by the client itself
PASSING = {
    "cut": Cut(700),
    "cut before an answer": Cut(0),
    "503": Status(503),
    "429": Status(429),
    "500": Status(500),
    "a page of HTML": Html(),
    "a flipped bit": Flip(5 * 512),
    "a stall": Stall(600),
    "a stall in the middle": Stall(600, after_bytes=300),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_leaves_right_data(server, packed, cache, fault):
    said = []
    server.fault = first(1, PASSING[fault])  # the first request for each object
    stalls = isinstance(PASSING[fault], Stall)
    dataset = packed
    with server_knows_its_manifest(server), supplied(server, cache, said, request_s=0.3 if stalls else 5) as supply:
        read_all(supply, dataset, epochs=1)
        assert supply.fetched.retries or fault in QUIET
    assert cache.present() == {s.sha256 for split in packed.splits.values() for s in split.shards} | {
        split.index_sha256 for split in packed.splits.values()
    }
    assert any("trying again" in text for text in said) or fault in QUIET


@contextmanager
def server_knows_its_manifest(server):
    """Faults are about shards and indexes: the manifest is read by a client of its own, tested in test_objects."""
    rule = server.fault
    server.fault = lambda request, nth: None if request.path == "dataset.json" else rule(request, nth)
    yield


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Status(404), r"shard .*train-000002\.tar cannot be read: 404 Not Found"),
        (Status(403), r"shard .*train-000002\.tar cannot be read: 403 Forbidden.*needs credentials"),
        (Status(503), r"shard .*train-000002\.tar cannot be read: 503 .*tried for 1 s \(data\.wait_seconds\)"),
        (Cut(300), r"shard .*train-000002\.tar cannot be read: .*tried for 1 s"),
        (Stall(600), r"shard .*train-000002\.tar cannot be read: no answer in time.*tried for 1 s"),
        (Html(), r"shard .*train-000002\.tar does not match its checksum"),
        (Flip(5 * 512), r"shard .*train-000002\.tar does not match its checksum.*did not when it was fetched again"),
    ],
)
def test_what_stays_is_an_error_with_the_shards_name(server, packed, cache, fault, says):
    server.fault = always(fault, "train-000002.tar")
    with supplied(server, cache, wait_s=1.0, request_s=0.2) as supply, pytest.raises(DataError, match=says):
        read_all(supply, packed)
    wrong = packed.splits["train"].shards[2].sha256
    assert not (cache.folder / wrong).exists()


def test_a_wrong_shard_is_fetched_once_more_and_no_more(server, packed, cache):
    server.fault = always(Flip(5 * 512), "train-000002.tar")
    with supplied(server, cache) as supply, pytest.raises(DataError, match="checksum"):
        read_all(supply, packed)
    assert whole(server, packed)["train-000002.tar"] == 2


def test_an_outage_is_waited_for(server, packed, cache):
    """The server is gone for the first requests, whatever they ask for, and answers later."""
    down, asked = threading.Event(), threading.Event()
    down.set()

    def rule(request, nth):
        asked.set()
        return Cut(0) if down.is_set() and request.path != "dataset.json" else None

    server.fault = rule
    threading.Thread(target=lambda: (asked.wait(), asked.clear(), asked.wait(), down.clear()), daemon=True).start()
    with supplied(server, cache) as supply:
        read_all(supply, packed, epochs=1)
        assert supply.fetched.retries


def test_a_server_without_ranges_gives_whole_shards(server, packed, cache):
    server.fault = always(NoRanges())
    with supplied(server, cache) as supply:
        read_all(supply, packed)
        assert supply.fetched.samples == 0
    assert cache.present() >= {s.sha256 for split in packed.splits.values() for s in split.shards}


def test_a_server_without_ranges_is_named_where_a_range_would_have_done(tmp_path, cache):
    large, said = make(tmp_path / "data", shard_samples=40), []
    with FileServer(large.root) as server:
        server.fault = always(NoRanges())
        with supplied(server, cache, said, leads=False) as supply, _closing(supply.reader("train", 1)) as reader:
            same(reader.read([3]), Reader(large, "train").read([3]))
            assert (supply.fetched.samples, supply.fetched.shards) == (0, 1)
    assert any("gives whole objects only" in text for text in said)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_transfer_that_is_always_cut_goes_on_where_it_was(tmp_path, kind):
    """A server that gives up to 600 kB at a time: all arrives, and hardly more than once."""
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "shard").write_bytes(data)
    counter = Counted()
    with SERVERS[kind](tmp_path / "served") as server, open(tmp_path / "copy", "wb") as file:
        server.fault = always(Cut(600_000))
        store = Store(server.url, server.endpoint)
        sha256 = Transfer(store, "shard", len(data), file.fileno(), counter)(Patience(5.0))
        assert len(data) <= server.sent("shard") < 2 * len(data)
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "copy").read_bytes() == data


def test_four_workers_of_a_node_fetch_each_shard_once(server, packed, tmp_path):
    """Four supplies with caches of their own, as four processes have, on one folder; one leads."""
    order, errors = order_of(packed), []
    meet = threading.Barrier(4)

    def work(rank):
        try:
            cache = Cache(tmp_path / "cache", cap=10**9)
            dataset = open_dataset(server.url, server.endpoint)
            needs = Needs(order, range(LANES), val=[0, 1], epochs=EPOCHS)
            supply = Supply(dataset, cache, needs, How(leads=rank == 0))
            meet.wait()
            read_all(supply, packed, lanes=[rank])
            meet.wait()
            supply.close()
        except BaseException as error:
            errors.append(error)
            meet.abort()

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    names = [shard.name for split in packed.splits.values() for shard in split.shards]
    assert whole(server, packed) == dict.fromkeys(names, 1)


def test_a_small_cache_evicts_and_stays_within_its_cap(server, packed, tmp_path):
    """Room for half of the shards: what was read makes room for what comes, and every byte is right."""
    shards = packed.splits["train"].shards
    cache = Cache(tmp_path / "cache", cap=3 * max(shard.bytes for shard in shards))
    with supplied(server, cache, threads=2) as supply:
        read_all(supply, packed)
        assert cache.used() <= cache.cap
        supply.at(EPOCHS * order_of(packed).steps_per_epoch)  # all is read: whatever is asked for now evicts another
        for shard in shards:
            wanted = Entry(supply.dataset.locate(shard.name), shard.sha256, shard.bytes)
            assert supply.bring(wanted)
            assert cache.has(wanted)
            assert cache.used() <= cache.cap
        assert supply.fetched.shards >= len(shards)


def test_a_cache_too_small_for_anything_reads_by_range_and_says_so(server, packed, tmp_path):
    said = []
    with supplied(server, Cache(tmp_path / "cache", cap=1), said) as supply:
        read_all(supply, packed)
        assert supply.fetched.shards == 0
        assert supply.fetched.samples == EPOCHS * order_of(packed).steps_per_epoch * LANES * 2 + 10
    assert any("data.cache_gb" in text and "one by one" in text for text in said)


def test_a_damaged_copy_in_the_cache_is_fetched_again(server, packed, cache):
    said = []
    with supplied(server, cache) as supply:
        read_all(supply, packed, epochs=1)
    shard = packed.splits["train"].shards[1]
    path = cache.folder / shard.sha256
    path.write_bytes(path.read_bytes().replace(b"\xff\xd8", b"\xff\x00"))
    with supplied(server, cache, said) as supply:
        read_all(supply, packed)
        assert supply.fetched.shards == 1
    assert any(f"{shard.name} in {path} is damaged" in text for text in said)


def test_a_damaged_copy_that_two_workers_have_open_is_right_for_both(packed, cache):
    """The first one puts a good copy in its place; the second one's open file is still the damaged one."""
    shard, ids = packed.splits["train"].shards[1], range(8, 16)
    with (
        FileServer(packed.root) as server,
        supplied(server, cache) as first_one,
        supplied(server, cache) as second,
        _closing(first_one.reader("train", 1)) as one,
        _closing(second.reader("train", 1)) as other,
    ):
        assert first_one.bring(Entry(first_one.dataset.locate(shard.name), shard.sha256, shard.bytes))
        for reader in (one, other):
            same(reader.read(ids), Reader(packed, "train").read(ids))
        with (cache.folder / shard.sha256).open("r+b") as file:
            file.write(bytes(shard.bytes))
        for reader in (one, other):
            same(reader.read(ids), Reader(packed, "train").read(ids))


def test_an_image_that_was_packed_damaged_is_a_bad_image_and_no_damaged_copy(packed, tmp_path, cache):
    """Its shard matches its hash, the image does not match the index: fetching again could not help."""
    broken = make(tmp_path / "data")
    overwrite(broken, "train", 3, b"\0")
    overwrite(broken, "train", 3, b"\1", index_too=False)  # after the index was written
    with FileServer(broken.root) as server:
        manifest = json.loads((broken.root / "dataset.json").read_text())
        for shard in manifest["splits"]["train"]["shards"]:
            shard["sha256"] = hashlib.sha256((broken.root / shard["name"]).read_bytes()).hexdigest()
        (broken.root / "dataset.json").write_text(json.dumps(manifest))
        with supplied(server, cache) as supply, _closing(supply.reader("train", 1)) as reader:
            assert reader.read([2, 3, 4]).intact.tolist() == [True, False, True]
            assert reader.read([3]).intact.tolist() == [False]
            assert supply.fetched.shards <= len(broken.splits["train"].shards) + 2
    assert reopened(broken).splits["train"].samples == 40


def test_a_pass_over_one_split(server, packed, cache):
    dataset = open_dataset(server.url, server.endpoint)
    supply = Supply(dataset, cache, InOrder("val", dataset.splits["val"].starts), How())
    with _closing(supply.reader("val", 1)) as reader:
        for sample in range(10):
            same(reader.read([sample]), Reader(packed, "val").read([sample]))
            supply.at(sample)
    supply.close()
    assert not [r for r in server.log if r.path.startswith("train-")]


def test_closing_ends_the_threads_and_whoever_waits(packed, cache):
    before = threading.active_count()
    with FileServer(packed.root) as server:
        with supplied(server, cache, wait_s=600) as supply:
            server.fault = always(Status(503))
            ended = []

            def wait():
                try:
                    supply.reader("train", 1)
                except DataError as error:
                    ended.append(str(error))

            waiting = threading.Thread(target=wait)
            waiting.start()
            while not supply.fetched.retries:
                os.sched_yield()
            supply.cancel()
            waiting.join()
        assert ended == ["the run ends"]
    assert threading.active_count() == before


def test_shards_named_by_url_in_a_bucket_that_is_only_read(packed, tmp_path, cache):
    """The manifest lies in a folder here, the tars on a server that somebody else laid out."""
    place = tmp_path / "adopted"
    place.mkdir()
    with FileServer(packed.root) as server:
        manifest = json.loads((packed.root / "dataset.json").read_text())
        for split in manifest["splits"].values():
            shutil.copy(packed.root / split["index"], place)
            for shard in split["shards"]:
                shard["name"] = f"{server.url}/{shard['name']}"
        (place / "dataset.json").write_text(json.dumps(manifest))
        dataset = open_dataset(place)
        assert dataset.digest == packed.digest
        supply = Supply(dataset, cache, Needs(order_of(dataset), range(LANES), [0, 1], epochs=EPOCHS), How())
        read_all(supply, packed)
        supply.close()


def test_the_first_batch_does_not_wait_for_its_shards(tmp_path, cache):
    """No shard comes as long as this server lives; the first batch is read by range."""
    large = make(tmp_path / "data", shard_samples=20)
    whole = [shard.name for split in large.splits.values() for shard in split.shards]
    with FileServer(large.root) as server:
        server.fault = lambda request, _: Stall(600) if request.begin is None and request.path in whole else None
        with supplied(server, cache, request_s=60.0) as supply, _closing(supply.reader("train", 1)) as reader:
            ids = order_of(large).ids(0, 0, range(2)).ravel()
            same(reader.read(ids), Reader(large, "train").read(ids))
            assert (supply.fetched.samples, supply.fetched.shards) == (len(ids), 0)


def test_ids_of_many_shards_fill_the_slab_in_their_order(server, packed, cache):
    ids = np.random.default_rng(0).permutation(40)
    with supplied(server, cache) as supply, _closing(supply.reader("train", 3)) as reader:
        for _ in range(3):
            same(reader.read(ids), Reader(packed, "train").read(ids))
