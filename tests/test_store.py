"""The door to object stores: a folder, HTTP and S3 alike; each failure of its kind, and told in one line."""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.remote.failures import Denied, NoRanges, NotThere, StoreError
from pipelines.remote.patience import LONGEST_S, Patience
from pipelines.remote.store import Store
from pipelines.remote.url import split_url
from tests import faults
from tests.faults import ACCESS_DENIED, Cut, Flip, Html, Request, Slow, Stall, Status, always, each, first
from tests.servers import FileServer, S3Server

DATA = bytes(i * i % 251 for i in range(300_000))
ODD = "a folder/50% of ünïcode %20.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("objects")
    for name, data in {"big.bin": DATA, "empty": b"", "sub/small.bin": b"small", ODD: b"odd"}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    return place


@pytest.fixture(scope="module")
def http(folder):
    with FileServer(folder) as server:
        yield server


@pytest.fixture(scope="module")
def s3(folder):
    with S3Server(folder) as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def server(request):
    """That behaves until it is told otherwise."""
    server = request.getfixturevalue(request.param)
    server.behave()
    return server


@pytest.fixture(params=["folder", "http", "s3"])
def place(request):
    """(where the objects lie, endpoint)"""
    found = request.getfixturevalue(request.param)
    if isinstance(found, Path):
        return str(found), ""
    found.behave()
    return found.url, found.endpoint


@pytest.fixture(params=["folder", "s3"])
def empty(request, tmp_path):
    """A place to write to."""
    if request.param == "folder":
        yield Store(str(tmp_path / "not yet" / "made"))
    else:
        s3 = request.getfixturevalue("s3")
        s3.behave()
        yield Store(f"{s3.url}/{tmp_path.name}", s3.endpoint)


def opened(server, request_s=60.0) -> Store:
    return Store(server.url, server.endpoint, request_s)


def test_objects_are_measured_and_read_alike_from_a_folder_http_and_s3(place):
    store = Store(*place)
    assert [store.size(name) for name in ("big.bin", "empty", ODD)] == [len(DATA), 0, 3]
    assert (store.read("big.bin"), store.read("empty"), store.read("sub/small.bin")) == (DATA, b"", b"small")
    assert b"".join(store.chunks("big.bin")) == DATA


def test_ranges_come_in_the_order_they_were_asked_for(place):
    begins, ends = [5, 299_990, 0, 150_000, 7], [15, 300_000, 1, 280_000, 9]
    parts = Store(*place).ranges("big.bin", begins, ends)
    assert [bytes(part) for part in parts] == [DATA[b:e] for b, e in zip(begins, ends, strict=True)]


def test_neighbouring_ranges_share_a_request(server):
    opened(server).ranges("big.bin", [0, 20, 4000], [10, 30, 5000])
    assert server.log == [Request("GET", "big.bin", 0, 5000, sent=5000)]


def test_an_object_that_ends_before_a_range_does_is_an_error(place):
    store = Store(*place)
    with pytest.raises(StoreError, match=r"big\.bin (ends after 300,000 bytes, before 300,001|cannot be read)") as told:
        store.ranges("big.bin", [10, 299_999], [20, 300_001])
    assert not told.value.passes
    with pytest.raises(StoreError, match=r"big\.bin cannot be read") as told:
        store.ranges("big.bin", [300_000], [300_001])
    assert not told.value.passes


@pytest.mark.parametrize("name", [ODD, "50% off", "a b", "ä", "plus+and&=", "%41"])
def test_names_of_any_letters_are_found_by_their_url(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"found")
    with FileServer(tmp_path) as server:
        root, path = split_url(f"{server.url}/{quote(name)}")
        assert Store(root).read(path) == b"found"


def test_names_below_a_folder_are_listed_in_order(empty):
    assert empty.names() == []
    for name in ("b/2", "b/10", "a", "bb", "b/c/d"):
        empty.write(name, b"")
    assert empty.names() == ["a", "b/10", "b/2", "b/c/d", "bb"]
    assert empty.names("b") == ["b/10", "b/2", "b/c/d"]
    assert empty.names("no") == []


def test_what_is_written_replaces_what_was_and_can_be_removed(empty):
    with pytest.raises(NotThere):
        empty.read("a")
    empty.write("a", b"one")
    empty.write("a", b"two")
    assert empty.read("a") == b"two"
    empty.remove("a")
    empty.remove("a")
    assert empty.names() == []


@pytest.mark.parametrize("make", [bytes, bytearray, lambda data: memoryview(bytearray(data))])
def test_any_memory_is_written_as_it_is(empty, make):
    data = bytes(range(256)) * 50_000  # goes in parts
    empty.write("a", make(data))
    assert empty.read("a") == data


def test_folders_come_with_their_objects_and_go_with_them(empty):
    for name in ("c/1/x", "c/1/y/z", "c/2/x", "c/file", "d/1/x"):
        empty.write(name, b"")
    found = empty.folders("c")
    assert found == {"c/1": ["c/1/x", "c/1/y/z"], "c/2": ["c/2/x"]}
    empty.remove_folder("c/1", found["c/1"])
    assert empty.folders("c") == {"c/2": ["c/2/x"]}
    empty.remove_folder("c/9", [])
    empty.remove_folder("c/1", found["c/1"])  # somebody was quicker
    assert empty.names() == ["c/2/x", "c/file", "d/1/x"]
    assert empty.folders("no") == {}


def test_on_a_disk_a_folder_without_an_object_is_found_too(tmp_path):
    """What a killed writer had staged is in no listing, and takes its room."""
    (tmp_path / "c" / "1").mkdir(parents=True)
    (tmp_path / "c" / "1" / "x#1").write_bytes(b"half")
    store = Store(str(tmp_path))
    assert (store.names(), store.folders("c")) == ([], {"c/1": []})
    store.remove_folder("c/1", [])
    assert list((tmp_path / "c").iterdir()) == []


def test_room_is_known_of_a_disk_alone(tmp_path, small_disk, s3):
    assert 20e6 < Store(str(small_disk)).free() < 26e6
    assert Store(str(small_disk / "not yet" / "made")).free() == Store(str(small_disk)).free()
    assert Store(s3.url, s3.endpoint).free() is None


@pytest.mark.parametrize("size", [0, 1000, (11 << 20) + 1])  # the last one goes in parts
def test_a_file_is_put_whatever_its_size(empty, tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes((DATA * (size // len(DATA) + 1))[:size])
    empty.write_file("put", path)
    assert empty.read("put") == path.read_bytes()


def test_an_object_is_created_once(empty):
    assert empty.create("lease", b"first")
    assert not empty.create("lease", b"second")
    assert empty.read("lease") == b"first"


def test_of_many_that_create_one_object_one_does(tmp_path):
    store, together = Store(str(tmp_path)), threading.Barrier(8)

    def create(i: int) -> bool:
        together.wait()
        return store.create("lease", b"%d" % i)

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    assert sum(created) == 1
    assert store.read("lease") == b"%d" % created.index(True)


ACTIONS = {
    "size": lambda store: store.size("big.bin"),
    "read": lambda store: store.read("big.bin"),
    "ranges": lambda store: store.ranges("big.bin", [10], [200_000]),
    "chunks": lambda store: list(store.chunks("big.bin")),
    "write": lambda store: store.write("new.bin", b"new"),
}
EVERY, BODIES = tuple(ACTIONS), ("read", "ranges", "chunks")


def failures():
    """(fault, the kind of failure, whether it may pass, its cause, what is tried)"""
    return [
        (Status(503), StoreError, True, "503 Service Unavailable", EVERY),
        (Status(500), StoreError, True, "500 Internal Server Error", EVERY),
        (Status(429), StoreError, True, "429 Too Many Requests", EVERY),
        (Status(405), StoreError, False, "405 Method Not Allowed", ("write",)),
        (Status(410), StoreError, False, "410 Gone", EVERY),
        (Status(404), NotThere, False, "404 Not Found", ("size", *BODIES)),
        (Status(401), Denied, False, "401 Unauthorized", EVERY),
        (Status(403), Denied, False, "403 Forbidden", EVERY),
        (ACCESS_DENIED, Denied, False, r"403 Forbidden \(AccessDenied\)", (*BODIES, "write")),
        (Cut(0), StoreError, True, "the connection was cut", EVERY),
        (Cut(1000), StoreError, True, "the connection was cut", BODIES),
        (Stall(10), StoreError, True, "no answer in time", EVERY),
        (Stall(10, 1000), StoreError, True, "no answer in time", BODIES),
        (Slow(1000), StoreError, True, "no answer in time", BODIES),
        (faults.NoRanges(), NoRanges, False, ".*[Rr]ange.*", ("ranges",)),
        (Html(), NoRanges, False, ".*[Rr]ange.*", ("ranges",)),
    ]


@pytest.mark.parametrize(
    ("fault", "kind", "passes", "cause", "tried"), failures(), ids=[str(row[0])[:20] for row in failures()]
)
def test_a_failure_is_of_its_kind_told_in_one_line_and_not_tried_again(server, fault, kind, passes, cause, tried):
    store = opened(server, request_s=0.3)
    server.fault = always(fault)
    with ThreadPoolExecutor(len(tried)) as pool:  # those that wait, wait together
        failures = list(pool.map(lambda action: failure(store, ACTIONS[action]), tried))
    for failed in failures:
        assert (type(failed), failed.passes) == (kind, passes)
        told = str(failed)
        assert re.fullmatch(rf"{server.url}/(big|new)\.bin cannot be (found|read|written): {cause}", told)
        assert not re.search(r"[<\n]|Debug|Generic|Error performing", told)
    assert len(server.log) == len(tried)


def failure(store, action) -> StoreError:
    with pytest.raises(StoreError) as failed:
        action(store)
    return failed.value


@pytest.mark.parametrize("action", EVERY)
def test_a_server_that_is_not_there_refuses_and_may_come_back(folder, action):
    with FileServer(folder) as server:
        store = opened(server)
    failed = failure(store, ACTIONS[action])
    assert (type(failed), failed.passes) == (StoreError, True)
    assert str(failed).endswith(": connection refused")


def test_what_fails_once_is_right_the_next_time(server):
    store = opened(server)
    server.fault = each(first(1, Cut(70_000), "big.bin"), first(1, Status(503), "big.bin", "HEAD"))
    failure(store, ACTIONS["ranges"])
    failure(store, ACTIONS["size"])
    assert bytes(ACTIONS["ranges"](store)[0]) == DATA[10:200_000]
    assert ACTIONS["size"](store) == len(DATA)
    assert [r.method for r in server.log] == ["GET", "HEAD", "GET", "HEAD"]
    assert server.sent("big.bin") == 70_000 + 199_990


def test_a_server_without_ranges_gives_the_whole(server):
    server.fault = always(faults.NoRanges())
    assert b"".join(opened(server).chunks("big.bin")) == opened(server).read("big.bin") == DATA


def test_a_flipped_bit_is_not_the_doors_business(server):
    """What the other tests rely on: the server flips the bit in a range as in the whole."""
    server.fault = always(Flip(1000), "big.bin")
    wrong = DATA[:1000] + bytes([DATA[1000] ^ 1]) + DATA[1001:]
    assert opened(server).read("big.bin") == wrong
    assert bytes(opened(server).ranges("big.bin", [900], [1100])[0]) == wrong[900:1100]
    assert bytes(opened(server).ranges("big.bin", [1001], [1100])[0]) == DATA[1001:1100]


def test_what_is_not_there_is_named(place):
    store = Store(*place)
    for failed in (failure(store, lambda store, ask=ask: ask("no/such.tar")) for ask in (store.size, store.read)):
        assert (type(failed), failed.passes) == (NotThere, False)
        assert re.match(rf"{store.place}/no/such\.tar cannot be (found|read): ", str(failed))


def test_a_bucket_that_is_not_there_is_named(s3):
    s3.behave()
    store = Store("s3://no-such-bucket", s3.endpoint)
    for action in (lambda store: store.read("a"), lambda store: store.names()):
        failed = failure(store, action)
        assert (type(failed), failed.passes) == (NotThere, False)
        assert re.search(r"s3://no-such-bucket.* cannot be \w+: 404 Not Found \(NoSuchBucket\)$", str(failed))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    store = Store(str(tmp_path / "no"))
    with pytest.raises(NotThere, match=r"/no does not exist$"):
        store.read("a")
    assert store.names() == []
    assert not (tmp_path / "no").exists()


def test_http_servers_are_read_only_and_say_so(http):
    http.behave()
    for action in (
        lambda store: store.write("new", b""),
        lambda store: store.create("new", b""),
        lambda store: store.remove("big.bin"),
        lambda store: store.names(),
    ):
        failed = failure(opened(http), action)
        assert (type(failed), failed.passes) == (StoreError, False)
        assert re.search(r"cannot be \w+: (405 Method Not Allowed|.* not yet implemented .*)$", str(failed))


def test_without_credentials_the_environment_is_named(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    with FileServer(tmp_path) as clouds:  # a machine's metadata service that knows no role
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", clouds.endpoint)
        for place in ("s3://bucket", "az://container"):
            failed = failure(Store(place), lambda store: store.size("a"))
            assert (type(failed), failed.passes) == (Denied, False)
            assert str(failed) == f"{place}/a cannot be found: no credentials were found in the environment"


def test_the_endpoint_may_come_from_the_environment(s3, monkeypatch):
    s3.behave()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert Store(s3.url).size("big.bin") == len(DATA)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert Store(s3.url, s3.endpoint).size("big.bin") == len(DATA)  # what is said goes before


@pytest.mark.parametrize(
    ("url", "root", "name"),
    [
        ("s3://bucket", "s3://bucket", ""),
        ("s3://bucket/a/b.tar", "s3://bucket", "a/b.tar"),
        ("s3://bucket/50%25", "s3://bucket", "50%25"),  # a key is what it is
        ("gs://bucket/a", "gs://bucket", "a"),
        ("az://container/a", "az://container", "a"),
        ("http://host:8000/a%20b/c.tar", "http://host:8000", "a b/c.tar"),
        ("https://host/%C3%BC", "https://host", "ü"),
        ("https://host/", "https://host", ""),
    ],
)
def test_a_url_is_a_root_and_a_name(url, root, name):
    assert split_url(url) == (root, name)


@pytest.mark.parametrize(
    "url",
    ["ftp://host/a", "hdfs://host/a", "s3:/bucket/a", "s3://", "http:///a", "/a/b", "a.tar", "https://host/a?sig=1",
     "https://host?sig=1", "https://host/a#b", "S3://bucket/a", "file:///a", "", "https://me:secret@host/a"],
)  # fmt: skip
def test_what_is_no_url_of_a_known_scheme_is_refused(url):
    with pytest.raises(
        ValueError, match=r"is not a URL of s3://, gs://, az://, http://, https:// without query"
    ) as caught:
        split_url(url)
    assert "secret" not in str(caught.value)


class Clock:
    """Stands still but for pauses, and for what a request takes."""

    def __init__(self, request_s: float = 0.0) -> None:
        self.now, self.pauses, self.request_s = 1000.0, [], request_s

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def fail(self, passes: bool = True) -> None:
        self.now += self.request_s
        error = StoreError("no")
        error.passes = passes
        raise error


@pytest.mark.parametrize(
    ("wait_s", "request_s", "pauses"),
    [
        (0.0, 0.0, []),
        (0.1, 0.0, []),
        (0.3, 0.0, [0.2]),
        (1.5, 0.0, [0.2, 0.4, 0.8]),
        (60.0, 0.0, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]),
        (60.0, 30.0, [0.2]),  # requests that time out use it up
        (60.0, 61.0, []),
    ],
)
def test_pauses_grow_until_time_is_up(wait_s, request_s, pauses):
    clock, heard = Clock(request_s), []
    with pytest.raises(StoreError, match="no"):
        Patience(wait_s, clock=lambda: clock.now, sleep=clock.sleep)(clock.fail, heard.append)
    assert clock.pauses == pytest.approx(pauses)
    assert [str(error) for error in heard] == ["no"] * len(pauses)


@given(wait_s=st.floats(0, 2000), request_s=st.floats(0, 100))
def test_patience_never_waits_longer_than_it_may(wait_s, request_s):
    clock = Clock(request_s)
    with pytest.raises(StoreError):
        Patience(wait_s, clock=lambda: clock.now, sleep=clock.sleep)(clock.fail)
    assert clock.now - 1000.0 <= wait_s + request_s + 1e-6  # the last request may have begun in time
    assert all(pause <= LONGEST_S for pause in clock.pauses)


def test_what_cannot_pass_is_not_tried_again():
    clock, heard = Clock(), []
    with pytest.raises(StoreError):
        Patience(60.0, clock=lambda: clock.now, sleep=clock.sleep)(lambda: clock.fail(passes=False), heard.append)
    assert (clock.pauses, heard) == ([], [])


def test_patience_gives_what_came_in_the_end():
    clock, answers = Clock(), iter([False, False, True])
    assert Patience(60.0, clock=lambda: clock.now, sleep=clock.sleep)(lambda: next(answers) or clock.fail()) is True
    assert clock.pauses == pytest.approx([0.2, 0.4])


def test_other_errors_are_not_patiences_business():
    clock = Clock()
    with pytest.raises(ZeroDivisionError):
        Patience(60.0, clock=lambda: clock.now, sleep=clock.sleep)(lambda: 1 // 0)
    assert clock.pauses == []


def test_a_failure_says_how_long_it_was_tried_or_what_would_help():
    patience = Patience(600.0, "data.wait_s")
    passing = StoreError("s3://b/a cannot be read: 503 Service Unavailable")
    passing.passes = True
    assert patience.told(passing) == f"{passing}, tried for 600 s (data.wait_s)"
    assert Patience(30.0).told(passing) == f"{passing}, tried for 30 s"
    assert patience.told(NotThere("s3://b/a cannot be found: 404")) == "s3://b/a cannot be found: 404"
    assert "AWS_*, GOOGLE_*, AZURE_*" in patience.told(Denied("s3://b/a cannot be found: 403"))


def test_nothing_is_left_of_a_server_that_stalled(folder):
    before, stalled = set(threading.enumerate()), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with FileServer(folder) as server:
            server.fault = lambda *_: stalled.set() or Stall(600)
            failed = pool.submit(failure, opened(server), ACTIONS["read"])
            assert stalled.wait(60)
        assert "the connection was cut" in str(failed.result())
    assert not set(threading.enumerate()) - before
