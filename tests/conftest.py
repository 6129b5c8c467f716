"""What the tests share: a packed digits dataset, and settings for small runs on it."""

import os
import subprocess
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores are shared by several processes

from orchestrator import settings


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A $SKIPLANE_HOME of its own, with the digits packed."""
    from pipelines.pack import pack
    from pipelines.sources.digits import digits

    place = tmp_path_factory.mktemp("home")
    pack(digits(), place / "data" / "digits", seed=0, shard_samples=180, progress=lambda *_: None)
    return place


@pytest.fixture
def settings_for(home, tmp_path):
    """flags -> the resolved settings of a run on the digits, stored in this test's folder, without MLflow."""

    def make(*flags: str, recipe: str = "digits-quick"):
        own = settings.parser("", "")
        place = ["--cluster.storage", str(tmp_path / "runs"), "--tracking.uri", "off"]
        return settings.load(["--recipe", recipe, *place, *flags], own, settings.Edge(home))[1]

    return make


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB of its own. Skipped where this machine does not let us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
