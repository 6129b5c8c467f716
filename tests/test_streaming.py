"""Training from servers: the same samples, pixels and weights as from a folder, one fetch a shard, waits that end."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from orchestrator import worker
from orchestrator.context import LocalContext
from orchestrator.plan import counts_of, lanes_of, make_plan
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from tests.faults import Stall, Status, always
from tests.gloo_group import GlooGroup
from tests.servers import FileServer, S3Server

ROOT = Path(__file__).parent.parent
SHORT = ("--train.epochs", "2", "--model.width", "4")
STREAMS = ("--data.streams", "2", "--data.window", "2")
SAME = ("weights_sha256", "data_digest", "curve")


@pytest.fixture
def digits(home):
    return open_dataset(home / "data" / "digits")


@pytest.fixture
def streamed(settings_for, tmp_path):
    """flags and a server -> settings of a run that reads from it, with a cache of this test's own."""

    def make(server, *flags):
        place = ("--data.root", server.url, "--data.cache", str(tmp_path / "cache"), "--data.wait_seconds", "20")
        endpoint = ("--data.endpoint", server.endpoint) if isinstance(server, S3Server) else ()
        return settings_for(*place, *endpoint, *flags)

    return make


def run(config, **context):
    torch.set_num_threads(1)
    return worker.train(worker.Job(config), LocalContext(**context))


def fetches(server, dataset):
    """How often each shard was fetched as a whole."""
    return Counter(r.path for r in server.log if r.method == "GET" and r.begin is None and r.path in once(dataset))


def once(dataset):
    return {shard.name: 1 for split in dataset.splits.values() for shard in split.shards}


@pytest.mark.parametrize("kind", [FileServer, S3Server])
def test_a_run_from_a_server_is_the_run_from_a_folder(settings_for, streamed, digits, kind):
    local = run(settings_for("--name", "local", *SHORT, *STREAMS))
    heard = []
    with kind(digits.root) as server:
        remote = run(streamed(server, "--name", "remote", *SHORT, *STREAMS), hear=heard.extend)
        assert fetches(server, digits) == once(digits)
    assert {key: remote[key] for key in SAME} == {key: local[key] for key in SAME}
    fetched = Counter()
    for record in heard:
        if record["kind"] == "fetched":
            fetched.update({name: count for name, count in record.items() if name != "kind"})
    assert fetched["shards"] == len(once(digits))
    assert fetched["shard_bytes"] >= sum(shard.bytes for split in digits.splits.values() for shard in split.shards)


def test_a_shard_that_cannot_be_had_ends_the_run_with_its_name(streamed, digits):
    with FileServer(digits.root) as server:
        server.fault = always(Status(404), "train-000003.tar")
        with pytest.raises(DataError, match=r"shard .*train-000003\.tar cannot be read: 404 Not Found"):
            run(streamed(server, "--name", "gone", *SHORT))


def test_another_dataset_under_the_same_url_is_refused_by_the_worker(streamed, digits):
    with FileServer(digits.root) as server:
        config = streamed(server, "--name", "changed", *SHORT)
        with pytest.raises(DataError, match="is not what it was when the run was submitted"):
            worker.train(worker.Job(config, None, "0" * 64), LocalContext())


@pytest.mark.slow
def test_four_workers_of_a_node_fetch_each_shard_once_over_several_epochs(settings_for, streamed, digits):
    """Real processes on one cache; the same samples and evaluation as one process from a folder."""
    local = run(settings_for("--name", "local", *SHORT, *STREAMS))
    with S3Server(digits.root) as server:
        with GlooGroup(streamed(server, "--name", "four", *SHORT, *STREAMS), 4) as group:
            ends = group.finish()
        assert fetches(server, digits) == once(digits)
    assert {end["data_digest"] for end in ends} == {local["data_digest"]}
    assert {end["curve"][-1]["eval_digest"] for end in ends} == {local["curve"][-1]["eval_digest"]}


@pytest.mark.slow
def test_a_killed_group_goes_on_with_what_its_cache_holds(streamed, digits):
    """SIGKILL in the middle of the first epoch; what was whole is not fetched again, what was not is."""
    flags = (*SHORT, *STREAMS, "--train.checkpoint_steps", "5")
    with FileServer(digits.root) as server:
        whole = streamed(server, "--name", "whole", *flags)
        with GlooGroup(whole, 2) as group:
            wanted = group.finish()[0]
        config = whole.replace({"name": "killed", "data.cache": whole.data.cache + "-2"})
        server.behave()
        with GlooGroup(config, 2) as group:
            saved = (r["step"] for r in group.records() if r["kind"] == "checkpoint")
            assert next(step for step in saved if step >= 10) < 44
            group.kill(0)
        assert not [p for p in Path(config.data.cache).iterdir() if p.stat().st_size == 0 and "." not in p.name]
        with GlooGroup(config, 2) as group:
            again = group.finish()[0]
        assert max(fetches(server, digits).values()) <= 2
    assert {key: again[key] for key in SAME} == {key: wanted[key] for key in SAME}


@pytest.fixture
def command(home, tmp_path):
    """Runs `python -m jobs.train` to its end; (exit code, stdout, stderr)."""

    def start(*flags):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"SKIPLANE_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        place = ("--cluster.storage", str(tmp_path / "runs"), "--tracking.uri", "off", "--data.cache")
        line = [sys.executable, "-m", "jobs.train", "--recipe", "digits-quick", *place, str(tmp_path / "cache"), *flags]
        ended = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        return ended.returncode, ended.stdout, ended.stderr

    return start


class Late:
    """Objects that are there so many seconds after they are first asked for more than a byte."""

    def __init__(self, paths, seconds):
        self.paths, self.seconds, self.began = paths, seconds, None

    def __call__(self, request, _):
        if request.method != "GET" or request.path not in self.paths or request.end == 1:
            return None
        self.began = self.began or time.monotonic()
        left = self.began + self.seconds - time.monotonic()
        return Stall(left) if left > 0 else None


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_waits_for_data_does_not_trip_the_others_timeout(command, settings_for, tmp_path, digits):
    """The shards of rank 1's stream come after 15 s, the group's own timeout is 10 s. Through Ray, from S3."""
    config = settings_for("--name", "x", *SHORT, *STREAMS)
    order = make_plan(config, counts_of(digits)).order
    others = {order.shard_of(first) for first, _ in order.pieces[order.stream_of(lanes_of(0, 2, order.lanes)[0])]}
    own = {order.shard_of(first) for first, _ in order.pieces[order.stream_of(lanes_of(1, 2, order.lanes)[0])]}
    late = {f"train-{shard:06d}.tar" for shard in own - others}
    assert late
    with S3Server(digits.root) as server:
        server.fault = Late(late, 15.0)
        flags = ("--data.root", server.url, "--data.endpoint", server.endpoint, "--cluster.timeout_seconds", "10")
        code, out, err = command("--name", "late", "--cluster.workers", "2", *SHORT, *STREAMS, *flags)
        assert code == 0, err
    result = json.loads((tmp_path / "runs" / "late" / "result.json").read_text())
    assert (result["status"], result["restarts"]) == ("finished", 0)
    assert result["fetched"]["shards"] == len(once(digits))
    assert f"fetched        {len(once(digits))} shards, " in out


@pytest.mark.slow
def test_preflight_says_who_cannot_read(command, tmp_path, digits):
    """The manifest may be read, the shards may not: refused before a worker is started, nothing is written."""
    with S3Server(digits.root) as server:
        server.fault = lambda r, _: Status(403) if r.method == "GET" and r.path.endswith(".tar") else None
        flags = ("--data.root", server.url, "--data.endpoint", server.endpoint)
        code, _, err = command("--name", "denied", *SHORT, *flags)
    assert code == 4
    assert "data.root cannot be used on " in err
    assert "403 Forbidden" in err
    assert "credentials" in err
    assert not (tmp_path / "runs" / "denied" / "checkpoints").exists()


@pytest.mark.parametrize("root", ["ftp://x/y", "s3://", "https://host/data?signature=1", "s3:/bucket/x"])
def test_a_url_that_is_none_is_a_setting(settings_for, root):
    with pytest.raises(
        ConfigError, match=r"data\.root is '.*'; use a folder, or s3://BUCKET/PATH, .*https://HOST/PATH"
    ):
        settings_for("--data.root", root)
