"""Packing with Ray tasks, on a real Ray that the command starts for itself."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from jobs import pack as job
from pipelines.errors import ConfigError
from tests.jpegs import jpeg
from tests.test_pack import tree
from tests.test_resume import contents, done_in, wait_until

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
NODES = """
import sys
from pathlib import Path
from orchestrator.cluster.environment import prepare
prepare(Path(sys.argv[1]))
from jobs import edge
from orchestrator.cluster import session, tasks

def double(task, tell, threads):
    tell(task)
    return 2 * task

def main(_):
    with session.session(2):
        told = []
        run = tasks.RayTasks(2)
        made = sorted(run(double, iter(range(9)), lambda task, more: told.append((task, more))))
        assert made == [(i, 2 * i) for i in range(9)], made
        assert sorted(told) == [(i, i) for i in range(9)], told
        next(tasks.RayTasks(2, [Path("/nowhere/train")])(double, [1], print))

edge.run(main)
"""


@pytest.fixture
def environment(tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"RAY_ADDRESS": "local", "SKIPLANE_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def flags(tmp_path):
    tree(tmp_path / "in" / "val", images=2)
    place = tree(tmp_path / "in" / "train", images=8)
    return ["folder", "--train", str(place), "--val", str(tmp_path / "in" / "val"), "--shard-samples", "5"]


def start(environment, *flags) -> subprocess.Popen:
    line = [sys.executable, "-m", "jobs.pack", *flags, "--workers", "2"]
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ray_packs_what_one_process_packs_though_one_of_its_processes_dies(environment, flags, tmp_path):
    """One image is a pipe: whoever reads it waits, is killed, and Ray gives the task again."""
    pipe = tmp_path / "in" / "train" / "class-1" / "pipe.jpg"
    os.mkfifo(pipe)
    process = start(environment, *flags, "--out", str(tmp_path / "ray"))
    try:
        wait_until(lambda: done_in(tmp_path / "ray") == 6)  # of 5 + 2
        children = psutil.Process(process.pid).children(recursive=True)
        (stuck,) = [p for p in children if "ray::_counted" in " ".join(p.cmdline())]
        stuck.kill()
        threading.Thread(target=pipe.write_bytes, args=(jpeg(9),), daemon=True).start()
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert "packing with Ray tasks on 1 node\n" in out
    threading.Thread(target=pipe.write_bytes, args=(jpeg(9),), daemon=True).start()
    assert job.main([*flags, "--out", str(tmp_path / "here")]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


def test_a_bad_image_on_a_node_is_the_same_sentence(environment, flags, tmp_path):
    (tmp_path / "in" / "val" / "class-0" / "0.jpg").write_text("<html>")
    process = start(environment, *flags, "--out", str(tmp_path / "out"))
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err.count("\n")) == (3, 1)
    assert err.startswith("error: class-0/0.jpg in val is not an image that can be decoded (it is not an image)")


def test_tasks_and_a_folder_that_a_node_does_not_see(environment, tmp_path):
    (tmp_path / "nodes.py").write_text(NODES)
    line = [sys.executable, str(tmp_path / "nodes.py"), str(tmp_path / "home")]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 4
    says = r"error: the source /nowhere/train is not there on node "
    assert done.stderr.startswith(says)
    assert done.stderr.endswith("; put it where every node sees it\n")


def test_a_relative_folder_means_nothing_on_a_cluster(flags, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="--out is data/x; on a cluster an absolute folder that every node sees"):
        job.main([*flags, "--out", "data/x", "--workers", "2"])
