"""The cache: each entry fetched once whoever asks, nothing half-written, evicted in the order of need."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.errors import ConfigError, DataError
from pipelines.remote.cache import Cache, Entry, NoRoom, file_system_of

ROOT = Path(__file__).parent.parent
NEVER = float("inf")


def entry(data):
    return Entry(f"s3://bucket/{len(data)}.tar", hashlib.sha256(data).hexdigest(), len(data))


def filled(*contents):
    """A `fill` that writes these bytes, one after the other each time it is called; and how often it was."""
    calls = []

    def fill(file):
        data = contents[min(len(calls), len(contents) - 1)]
        calls.append(data)
        os.pwrite(file, data, 0)
        return hashlib.sha256(data).hexdigest()

    return fill, calls


def put(cache, data, later=lambda _: NEVER):
    return cache.bring(entry(data), filled(data)[0], later)


def names(cache):
    return {path.name for path in cache.folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", cap=1000)


def test_what_was_brought_is_there_for_others_too(cache):
    assert put(cache, b"a" * 10)
    other = Cache(cache.folder, cap=1000)
    assert other.has(entry(b"a" * 10))
    assert other.present() == {entry(b"a" * 10).sha256}
    opened = other.open(entry(b"a" * 10))
    assert os.pread(opened.file, 99, 0) == b"a" * 10
    opened.close()
    assert not put(other, b"a" * 10)
    assert other.open(entry(b"b")) is None
    other.remove(entry(b"a" * 10))
    assert names(cache) == set()


def test_many_ask_and_one_fetches(cache):
    """Sixteen at once, with a cache of their own each, as processes have: locks are between open files."""
    fill, calls = filled(b"x" * 100)
    start = threading.Barrier(16)

    def ask(_):
        start.wait()
        own = Cache(cache.folder, cap=1000)
        return own.bring(entry(b"x" * 100), fill, lambda _: NEVER), own.has(entry(b"x" * 100))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert sorted(answers) == [(False, True)] * 15 + [(True, True)]
    assert len(calls) == 1


def test_wrong_bytes_are_fetched_once_more_and_never_kept(cache):
    good = b"good" * 5
    fill, calls = filled(b"evil" * 5, good)
    assert cache.bring(entry(good), fill, lambda _: NEVER)
    assert len(calls) == 2
    fill, calls = filled(b"evil" * 6)
    with pytest.raises(DataError, match=r"shard s3://bucket/24.tar does not match its checksum .* fetched again"):
        cache.bring(entry(b"good" * 6), fill, lambda _: NEVER)
    assert len(calls) == 2
    assert names(cache) == {entry(good).sha256}


def test_who_waited_while_wrong_bytes_were_fetched_does_not_fetch_them_again(cache):
    """Eight threads of one process want what is wrong; whoever gets the lock after the first one knows."""
    fill, calls = filled(b"evil" * 6)
    start = threading.Barrier(8)

    def ask(_):
        start.wait()
        with pytest.raises(DataError, match="checksum"):
            cache.bring(entry(b"good" * 6), fill, lambda _: NEVER)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert len(calls) == 2


def test_a_file_of_another_length_is_wrong(cache):
    fill, _ = filled(b"x" * 10 + b"more")
    with pytest.raises(DataError, match="checksum"):
        cache.bring(entry(b"x" * 10), fill, lambda _: NEVER)


def test_what_fails_leaves_nothing(cache):
    def fill(file):
        os.pwrite(file, b"half", 0)
        raise KeyError("cut")

    with pytest.raises(KeyError):
        cache.bring(entry(b"x" * 10), fill, lambda _: NEVER)
    assert names(cache) == set()
    assert put(cache, b"x" * 10)


KILLED = """
import os, sys, time
from pathlib import Path
from pipelines.remote.cache import Cache, Entry

def fill(file):
    os.pwrite(file, b"half", 0)
    print("half", flush=True)
    time.sleep(600)

Cache(Path(sys.argv[1]), cap=1000).bring(Entry("s3://b/x", sys.argv[2], 10), fill, lambda _: 1.0)
"""


def test_a_killed_process_leaves_nothing_that_looks_whole_and_is_swept_away(cache):
    wanted = entry(b"x" * 10)
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(cache.folder), wanted.sha256], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout.readline() == "half\n"
    assert not cache.has(wanted)
    assert cache.present() == set()
    waiting = threading.Event()
    assert not cache.bring(wanted, filled(b"")[0], lambda _: NEVER, lambda: waiting.is_set() or waiting.set())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert names(cache) == {f"{wanted.sha256}.part"}
    assert cache.used() == 10
    assert put(cache, b"y" * 20)  # makes room, and sweeps
    assert names(cache) == {entry(b"y" * 20).sha256}
    assert put(cache, b"x" * 10)


def test_what_is_needed_latest_goes_first_and_of_the_unknown_the_oldest(cache):
    contents = [bytes([65 + i]) * 300 for i in range(3)]
    for age, data in enumerate(contents):
        put(cache, data)
        os.utime(cache.folder / entry(data).sha256, (age, age))
    needed = {entry(contents[0]).sha256: 5.0, entry(contents[2]).sha256: 2.0}
    put(cache, b"D" * 300, lambda sha256: needed.get(sha256, NEVER))  # the one that nobody needs
    assert names(cache) == {entry(d).sha256 for d in (contents[0], contents[2], b"D" * 300)}
    put(cache, b"E" * 300, lambda sha256: {**needed, entry(b"D" * 300).sha256: 1.0}.get(sha256, NEVER))
    assert names(cache) == {entry(d).sha256 for d in (contents[2], b"D" * 300, b"E" * 300)}
    os.utime(cache.folder / entry(b"E" * 300).sha256, (1, 1))
    put(cache, b"F" * 300)
    assert names(cache) == {entry(d).sha256 for d in (contents[2], b"D" * 300, b"F" * 300)}


def test_what_is_needed_sooner_or_open_stays(cache):
    put(cache, b"a" * 400)
    put(cache, b"b" * 400)
    with pytest.raises(NoRoom, match=r"data\.cache_gb allows 0\.0 GB in .*open or needed sooner"):
        put(cache, b"c" * 400, lambda _: 0.0)
    held = cache.open(entry(b"a" * 400))
    put(cache, b"c" * 400)
    assert names(cache) == {entry(d * 400).sha256 for d in (b"a", b"c")}
    with pytest.raises(NoRoom):
        put(cache, b"d" * 700)
    held.close()
    put(cache, b"d" * 700)
    assert names(cache) == {entry(b"d" * 700).sha256}


def test_a_full_disk_is_no_room_and_leaves_nothing(tmp_path):
    """A real refusal of the kernel: files may not grow beyond 20 kB for the moment."""
    cache = Cache(tmp_path / "cache", cap=1_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(NoRoom, match=r"the disk of data\.cache = .* is full \(File too large\)"):
            put(cache, b"x" * 30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(cache) == set()
    assert put(cache, b"x" * 30_000)


def test_without_a_cap_it_takes_nine_tenths_of_what_is_free(tmp_path):
    cache = Cache(tmp_path / "cache")
    free = os.statvfs(tmp_path)
    assert cache.cap == pytest.approx(0.9 * free.f_bavail * free.f_frsize, rel=0.05)


@pytest.mark.skipif(file_system_of(Path("/dev/shm")) != "tmpfs", reason="no RAM disk at /dev/shm")
def test_a_ram_disk_is_refused_unless_asked_for():
    folder = Path(f"/dev/shm/skiplane-test-{os.getpid()}")
    try:
        with pytest.raises(ConfigError, match=r"data\.cache is /dev/shm/.* in memory \(tmpfs\).*cache_in_memory true"):
            Cache(folder)
        assert not folder.exists()
        assert Cache(folder, in_memory=True).file_system == "tmpfs"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_that_cannot_be_made_is_a_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"data\.cache is .*file/cache, which cannot be made: (Not a dir|File exists)"
    ):
        Cache(tmp_path / "file" / "cache")


def test_nothing_is_evicted_for_what_cannot_fit(cache):
    for letter in b"abc":
        put(cache, bytes([letter]) * 300)
    with pytest.raises(NoRoom):
        put(cache, b"d" * 1001)
    assert len(cache.present()) == 3


def test_a_cache_that_was_cleared_away_is_made_again(cache):
    put(cache, b"a" * 100)
    shutil.rmtree(cache.folder)
    assert cache.present() == set()
    assert put(cache, b"a" * 100)


def test_a_copy_of_another_size_is_taken_out(cache):
    put(cache, b"a" * 100)
    os.truncate(cache.folder / entry(b"a" * 100).sha256, 50)
    assert cache.open(entry(b"a" * 100)) is None
    assert put(cache, b"a" * 100)
    (cache.folder / entry(b"b").sha256).mkdir()
    with pytest.raises(DataError, match="is no file of the cache; remove it"):
        cache.open(entry(b"b"))


def test_strange_files_are_left_alone(cache):
    (cache.folder / "thesis.txt").write_text("mine")
    put(cache, b"a" * 900)
    put(cache, b"b" * 900)
    assert names(cache) == {"thesis.txt", entry(b"b" * 900).sha256}
