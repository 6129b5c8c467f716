"""Packing that was cut short goes on, with any number of processes, to the same bytes; no process outlives it."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from jobs import pack as job
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from pipelines.pack import left_out_of, pack
from pipelines.packing.packing import Packing
from pipelines.packing.target import Target
from pipelines.packing.unfinished import Unfinished
from pipelines.sources import Item, Source
from tests.datasets import MINI, MINI_TARS, make, source
from tests.jpegs import jpeg

ROOT = Path(__file__).parent.parent
SHARDS = 7  # of make()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    return contents(make(tmp_path_factory.mktemp("whole") / "data").root)


def cut_short(out: Path, images: int = 20, **changes) -> None:
    """Stops as Ctrl-C does when so many images are done: two shards of eight and a half."""

    def progress(_, done, __):
        if done == images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source(), out, **{"seed": 0, "shard_samples": 8, "progress": progress} | changes)


def test_what_an_interrupt_leaves_is_gone_on_from(tmp_path, whole):
    out = tmp_path / "out"
    cut_short(out)
    assert sorted(p.name for p in out.iterdir()) == [".packing", "train-000000.tar", "train-000001.tar"]
    done = {"train-000000.done", "train-000001.done"}
    assert {p.name for p in (out / ".packing").iterdir()} == {"plan.json", "lock", *done}
    with pytest.raises(DataError, match="cut short; give the"):
        open_dataset(out)
    written = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    make(out)
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written  # not made again


def test_progress_of_what_was_done_before_comes_first(tmp_path):
    cut_short(tmp_path / "out")
    heard = []
    pack(source(), tmp_path / "out", seed=0, shard_samples=8, progress=lambda *at: heard.append(at))
    assert heard[:2] == [("train", 16, 40), ("train", 17, 40)]
    assert heard[-1] == ("val", 10, 10)


DAMAGE = {
    "a tar is gone": lambda out: (out / "train-000000.tar").unlink(),
    "a tar is short": lambda out: os.truncate(out / "train-000001.tar", 999),
    "a record is torn": lambda out: os.truncate(out / ".packing" / "train-000001.done", 300),
    "a record is empty": lambda out: os.truncate(out / ".packing" / "train-000000.done", 0),
    "a part is left": lambda out: (out / ".packing" / "train-000002.tar.x.part").write_bytes(b"half"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_made_again(tmp_path, whole, damage):
    out = tmp_path / "out"
    cut_short(out)
    DAMAGE[damage](out)
    make(out)
    assert contents(out) == whole


def test_a_packer_that_ended_just_before_it_cleared_up(tmp_path, whole):
    """dataset.json is there and so is the plan: it is finished by going on."""
    out, flags = tmp_path / "out", ["digits", "--out", str(tmp_path / "out")]
    assert job.main(flags) == 0
    before = contents(out)
    made = {k: v for k, v in open_dataset(out).made.items() if k != "left_out"}
    with Target(str(out)).locked():
        (out / ".packing" / "plan.json").write_text(json.dumps({"made": made, "shards": {"train": 8, "val": 2}}))
    assert job.main(flags) == 0
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "shuffle_seed was 0, is 1"),
        ({"shard_samples": 9}, "shard_samples was 8, is 9"),
        ({"source": Source(("a",), source().splits, {"source": "other"})}, "source was test, is other"),
    ],
)
def test_another_command_does_not_lose_what_is_done(tmp_path, whole, change, says):
    out = tmp_path / "out"
    cut_short(out)
    before = contents(out / ".packing")
    settings = {"source": source(), "seed": 0, "shard_samples": 8} | change
    with pytest.raises(ConfigError, match=rf"unfinished packing that was begun in another way \({says}\); give that"):
        pack(settings.pop("source"), out, progress=lambda *_: None, **settings)
    assert contents(out / ".packing") == before
    make(out)
    assert contents(out) == whole


def test_a_beginning_without_a_shard_gives_way(tmp_path, whole):
    """Its packer was killed: even a tar that had just come into place goes."""
    target = Target(str(tmp_path / "out"))
    with target.locked():
        Unfinished(Packing(source(), 1, 3), target)
        target.write("train-000013.tar", b"just in place")
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_somebody_elses_file_beside_a_beginning_stops_another_job(tmp_path):
    target = Target(str(tmp_path / "out"))
    with target.locked():
        Unfinished(Packing(source(), 1, 3), target)
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="out holds something else"):
        make(tmp_path / "out")


def odd(*loads) -> Source:
    good = [Item(f"good-{i}", 0, lambda i=i: jpeg(i)) for i in range(9)]
    bad = [Item("odd", 0, load) for load in loads]
    return Source(("a",), {"train": good, "val": [*good[:2], *bad]}, {"source": "odd"})


def test_a_refused_image_keeps_what_is_done_and_may_then_be_skipped(tmp_path):
    settings = {"seed": 0, "shard_samples": 3, "progress": lambda *_: None}
    with pytest.raises(
        DataError, match=r"odd in val is not .* --bad skip; 3 of 4 shards are done and kept: the same command goes on"
    ):
        pack(odd(lambda: b"x"), tmp_path / "out", **settings)
    made = pack(odd(lambda: b"x"), tmp_path / "out", **settings, bad="skip")
    assert [one["name"] for one in left_out_of(made)] == ["odd"]
    assert made.splits["val"].samples == 2


def test_what_was_skipped_before_is_refused_when_going_on_with_refusal(tmp_path):
    def load():
        raise KeyboardInterrupt

    settings = {"seed": 0, "shard_samples": 3, "progress": lambda *_: None}
    items = [Item("bad", 0, lambda: b"x"), *odd().splits["train"][:2]]

    def both(last):
        return Source(("a",), {"train": items, "val": [Item("stops", 0, last)]}, {"source": "odd"})

    with pytest.raises(KeyboardInterrupt):
        pack(both(load), tmp_path / "out", **settings, bad="skip")
    with pytest.raises(DataError, match="bad in train is not an image that can be decoded"):
        pack(both(lambda: jpeg(1)), tmp_path / "out", **settings)
    assert pack(both(lambda: jpeg(1)), tmp_path / "out", **settings, bad="skip").splits["train"].samples == 2


def test_a_shard_without_a_good_image_is_dropped(tmp_path):
    items = [Item(f"x{i}", 0, lambda: b"x") for i in range(3)] + list(odd().splits["train"])
    images = Source(("a",), {"train": items, "val": items}, {"source": "odd"})
    made = pack(images, tmp_path / "out", seed=0, shard_samples=1, progress=lambda *_: None, bad="skip")
    split = made.splits["train"]
    assert split.counts == (1,) * 9
    numbers = [int(shard.name[6:12]) for shard in split.shards]
    assert numbers == sorted(numbers)
    assert max(numbers) > 8  # a shard keeps its number
    assert made.index("train")["shard"].tolist() == list(range(9))
    assert {p.name for p in made.root.glob("train-*.tar")} == {shard.name for shard in split.shards}


def test_a_disk_that_fills_up_is_one_sentence_and_packing_goes_on(tmp_path):
    """A real refusal of the kernel: no file may grow to the size of the last shard."""
    images = odd(partial(jpeg, 1, 900, 900))
    settings = {"seed": 0, "shard_samples": 3, "progress": lambda *_: None}
    whole = contents(pack(images, tmp_path / "whole", **settings).root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["val-000000.tar"]) - 1, limits[1]))
    try:
        with pytest.raises(
            ConfigError, match=r"--out .*out cannot be written: File too large; make room.*; 3 of 4 shards are done"
        ):
            pack(images, tmp_path / "out", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pack(images, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == whole


def test_a_small_disk_that_is_really_full(tmp_path, whole):
    mount = tmp_path / "disk"
    mount.mkdir()
    size = sum(map(len, whole.values())) * 2 // 3
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(
            ConfigError, match=r"cannot be written: No space left on device; make room.* shards are done"
        ):
            make(mount / "out")
        subprocess.run(["mount", "-o", "remount,size=10m", str(mount)], check=True)
        make(mount / "out")
        assert contents(mount / "out") == whole
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# -- with processes ----------------------------------------------------------------------------------------------------


class Held:
    """Class folders with one image that is a pipe: whoever packs it waits until the test feeds it."""

    def __init__(self, root: Path) -> None:
        for split, count in (("train", 24), ("val", 4)):
            for i in range(count):
                path = root / split / "ab"[i % 2] / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(i))
        self.root, self.pipe = root, root / "train" / "a" / "pipe.jpg"
        os.mkfifo(self.pipe)

    def start(self, out: Path, workers: int) -> subprocess.Popen:
        flags = ["--train", str(self.root / "train"), "--val", str(self.root / "val"), "--shard-samples", "3"]
        line = [sys.executable, "-m", "jobs.pack", "folder", *flags, "--out", str(out), "--workers", str(workers)]
        return subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self, out: Path, workers: int) -> str:
        """Packs with the image fed; what was said."""
        threading.Thread(target=self.pipe.write_bytes, args=(jpeg(99),), daemon=True).start()
        process = self.start(out, workers)
        said, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        return said


def wait_until(true, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def done_in(out: Path) -> int:
    return len(list((out / ".packing").glob("*.done")))


@pytest.fixture
def held(tmp_path):
    return Held(tmp_path / "in")


@pytest.fixture
def stuck(held, tmp_path):
    """A packer with two processes, one of which waits for the pipe while the other has done all else."""
    process = held.start(tmp_path / "out", 2)
    wait_until(lambda: done_in(tmp_path / "out") == 10)  # of 9 + 2
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_no_process_outlives_a_killed_packer_and_the_next_one_goes_on(held, stuck, tmp_path):
    children = psutil.Process(stuck.pid).children(recursive=True)
    assert len(workers_of(stuck)) == 2
    stuck.kill()
    stuck.wait()
    assert not psutil.wait_procs(children, timeout=30)[1]
    said = held.finish(tmp_path / "out", 3)
    assert "going on: 10 of 11 shards are done" in said
    held.finish(tmp_path / "whole", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_sentence(held, stuck, tmp_path):
    for worker in workers_of(stuck):
        worker.kill()
    out, err = stuck.communicate(timeout=60)
    assert stuck.returncode == 4
    assert err.count("\n") == 1
    assert "error: a packing process was ended by SIGKILL while it made train-00000" in err
    assert err.endswith("10 of 11 shards are done and kept: the same command goes on\n")
    assert "packing with 2 processes" in out
    assert "packed" in held.finish(tmp_path / "out", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_all_quietly(stuck, tmp_path, number, code):
    """SIGINT goes to the whole group, as from a terminal; SIGTERM to the command."""
    children = psutil.Process(stuck.pid).children(recursive=True)
    (os.killpg if number == signal.SIGINT else os.kill)(stuck.pid, number)
    out, err = stuck.communicate(timeout=60)
    assert (stuck.returncode, err) == (code, "stopped\n")
    assert f"what is done of {tmp_path / 'out'} is kept: the same command goes on" in out
    assert not psutil.wait_procs(children, timeout=30)[1]


@pytest.mark.slow
def test_a_bad_image_in_another_process_is_the_same_sentence(tmp_path, capsys):
    from tests.test_pack import flags, tree

    folders = tree(tmp_path / "in" / "train"), tree(tmp_path / "in" / "val", images=2)
    (folders[1] / "class-1" / "0.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"class-1/0\.jpg in val is not an image that can be decoded \(it is not an i"):
        job.main([*flags(folders, tmp_path / "out"), "--workers", "2"])
    assert job.main([*flags(folders, tmp_path / "out"), "--workers", "2", "--bad", "skip"]) == 0
    assert "left out 1 images" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not MINI.exists(), reason="no ImageNet sample on this machine (SKIPLANE_TEST_DATA)")
def test_a_real_one_killed_half_way_is_the_same_dataset(tmp_path):
    """One process undisturbed; two whose packer is killed when half of the images are done; three that go on."""
    flags = [word for name, path in MINI_TARS.items() for word in (f"--{name}", str(path))]
    line = [sys.executable, "-m", "jobs.pack", "ilsvrc", *flags, "--expect", "any", "--shard-samples", "40"]

    def packed(out: str, workers: int) -> str:
        command = [*line, "--out", str(tmp_path / out), "--workers", str(workers)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    killed = subprocess.run(
        [sys.executable, "-c", KILLS_ITSELF, str(tmp_path / "cut")], cwd=ROOT, capture_output=True, timeout=200
    )
    assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, b"", b"")
    with pytest.raises(DataError, match="packing was cut short"):
        open_dataset(tmp_path / "cut")
    done = done_in(tmp_path / "cut")
    assert 3 <= done <= 8  # 200 images are five shards of 40, and two may be half done
    assert f"packing with 3 processes\ngoing on: {done} of 13 shards are done\n" in packed("cut", 3)
    packed("whole", 1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


KILLS_ITSELF = """
import os, signal, sys
from pipelines.pack import pack
from pipelines.packing.processes import Processes
from pipelines.sources.ilsvrc import ilsvrc
from tests.datasets import MINI_TARS

def progress(split, done, total):
    if done >= 200:
        os.kill(os.getpid(), signal.SIGKILL)

source = ilsvrc(**MINI_TARS, expect="any")
pack(source, sys.argv[1], seed=0, shard_samples=40, progress=progress, run=Processes(2))
"""
