"""The planning benchmark runs and writes what it prints; the run that it resumes gets the right batch."""

import gc
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plan, resuming
from benchmarks.resuming import STAGES, Shape, Watch, enlarged, first_batch, skipping
from benchmarks.servers import Server
from pipelines.dataset import verify
from pipelines.errors import DataError
from pipelines.reader import Reader
from tests.datasets import make

AT = ("0%", "90%")
ROOT = Path(__file__).parents[1]
SHAPE = Shape(streams=2, lanes=4, micro_batch=2, window=2)
COUNTS = [10, 10, 10, 10, 10, 7]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture(scope="module")
def large(packed, tmp_path_factory):
    return enlarged(packed.root, tmp_path_factory.mktemp("large"), COUNTS, distinct=2)


@pytest.mark.slow
def test_it_measures_planning_and_resuming(packed, tmp_path):
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "benchmarks.plan", "--data", str(packed.root), "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    setting = written["setting"]
    assert len(written["planning"]) == 4  # two sizes, with windows and without
    for name, costs in written["planning"].items():
        samples = setting["samples"] if name.startswith(f"{setting['samples']:,} ") else setting["large"]
        assert all(cost["seconds"] > 0 and cost["peak"] >= cost["held"] for cost in costs.values())
        if "index, 24 bytes a sample" in costs:
            places = 200 * (samples // setting["shard_samples"])  # bytes, of the shards' names
            assert 24 * samples <= costs["index, 24 bytes a sample"]["held"] < 24 * samples + places + 20_000
    rounds = written["resuming"]["skiplane"]
    assert list(rounds) == [f"{place}, {share}" for place in ("folder", "http", "http, 100 MB/s") for share in AT]
    assert all(len(its) == setting["rounds"] and list(its[0]) == list(STAGES) for its in rounds.values())
    for told in written["resuming"]["webdataset"].values():
        assert told["samples"] == pytest.approx(0.9 * setting["samples"] / plan.NODE)
        assert told["seconds"] == pytest.approx(told["us_a_sample"] * told["samples"] / 1e6)


def test_every_record_of_the_large_dataset_is_a_real_image(packed, large):
    assert large.splits["train"].counts == tuple(COUNTS)
    verify(large, "sha256")
    known = set(packed.index("train")["crc32"].tolist())
    with closing(Reader(large, "train")) as reader:
        batch = reader.read(range(sum(COUNTS)))
    assert batch.intact.all()
    assert set(batch.crc32.tolist()) <= known
    assert len(list(large.root.glob("*.tar"))) == len(COUNTS)
    assert len({path.stat().st_ino for path in large.root.glob("*.tar")}) == 2


@pytest.mark.parametrize("served", [False, True])
def test_the_resumed_run_reads_the_samples_of_its_position(large, served, tmp_path, monkeypatch):
    """From a folder and from a server; more is read ahead, nothing else before it."""
    asked, read = [], resuming._Watched.read
    monkeypatch.setattr(resuming._Watched, "read", lambda self, *args: asked.append(args[0]) or read(self, *args))
    with Server("http", large.root) as server:
        place = server.url if served else str(large.root)
        stages = first_batch(place, tmp_path / "cache", SHAPE, 0.9, 32, 1)
    assert list(stages) == list(STAGES)
    assert all(seconds >= 0 for seconds in stages.values())
    order = SHAPE.order(COUNTS)
    assert int(0.9 * order.steps_per_epoch) == 6
    assert np.array_equal(asked[0], order.ids(0, 6, range(1)).ravel())


def test_shards_that_are_not_there_fail_where_they_are_read(tmp_path):
    place = plan._without_shards([5, 5], tmp_path)
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        first_batch(str(place), tmp_path / "cache", Shape(1, 1, 2, 0), 0.0, 32, 1)


def test_stages_add_up_and_are_told_once():
    watch = Watch()
    for stage in STAGES:
        watch(stage)
    stages = watch.stages()
    for stage in STAGES:
        watch(stage)
    assert watch.stages() == stages
    assert list(stages) == list(STAGES)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves them to the collector
def test_skipping_reads_no_more_than_there_is(large):
    shards = [str(large.root / shard.name) for shard in large.splits["train"].shards]
    assert skipping(shards, 5) > 0
    with pytest.raises(ValueError, match="holds 60 samples, 1,000 were to be skipped"):
        skipping(shards, 1000)
    gc.collect()


@pytest.mark.parametrize(
    ("samples", "each", "counts"), [(10, 5, [5, 5]), (11, 5, [5, 5, 1]), (4, 5, [4]), (1_281_167, 1250, None)]
)
def test_counts_of_shards(samples, each, counts):
    found = plan._counts(samples, each)
    assert sum(found) == samples
    assert found == counts or (counts is None and len(found) == 1025)
