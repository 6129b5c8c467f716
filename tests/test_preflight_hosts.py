"""Real hosts that cannot take part are refused at the start, by name: a clock, a folder, a disk that is too small."""

import re
import sys

import pytest

from tests.hosts import Hosts, supported

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(supported()), reason=supported())]
# Python reads this first on the hosts. Namespaces have no wall clocks of their own, so one host's processes are told.
CLOCK = """
import socket, time
from pathlib import Path
if socket.gethostname() == "host2" and Path(__file__).with_name("late").exists():
    time.time = lambda now=time.time: now() - 100_000
"""
FLAGS = ("--recipe", "digits-quick", "--tracking.uri", "off", "--cluster.workers", "2")
LARGE = ("--model.layout", "imagenet", "--model.depth", "152", "--model.width", "64", "--model.shortcut", "B")


@pytest.mark.long
def test_hosts_that_cannot_take_part_are_named(home, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    with Hosts(cpus=(0, 1, 1), settings={"PYTHONPATH": str(tmp_path)}, shared_mb=64) as hosts:
        hosts.wait(3)

        def refused(name, storage, *flags):
            place = ("--data.root", str(home / "data" / "digits"), "--cluster.storage", str(storage / "runs"))
            line = [sys.executable, "-m", "jobs.train", "--name", name, *FLAGS, *place, *flags]
            driver = hosts.run(1, line)
            out, err = driver.communicate(timeout=180)
            assert driver.returncode == 4, (out, err[-3000:])
            return err

        told = refused("apart", hosts.own)
        assert f"cannot be used on 10.83.0.12: {hosts.own}/runs/apart is not shared: what the driver wrote" in told
        told = refused("large", hosts.shared, *LARGE)
        assert re.search(r"cluster\.storage has 6\d\.\d MB free in .*/large; 4 checkpoints of 4\d\d\.\d MB", told), told
        (tmp_path / "late").touch()
        told = refused("late", hosts.shared)
        assert re.search(r"more than 30 s apart: 10\.83\.0\.12 is (99,9\d\d|100,000) s behind the driver", told), told
        left = {path.relative_to(hosts.shared / "runs") for path in (hosts.shared / "runs").rglob("*.*")}
        assert not [path for path in left if path.parts[1] in ("checkpoints", ".preflight")]
