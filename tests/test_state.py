"""Checkpoints and records: what is whole is found, what is torn is passed over, a name keeps its identity."""

import hashlib
import io
import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import RunConfig
from orchestrator.state.checkpoints import Checkpoints, Owner, step_of, weights_sha256
from orchestrator.state.packed import TENSORS, Progress, pack
from orchestrator.state.records import admit, read_result, record_of, write_record
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError, ConfigError, DataError
from tests.servers import S3Server

ROOT = Path(__file__).parent.parent


def progress(step):
    return Progress(
        step=step, epoch=0, digest=2**64 - step, sums={"a": 0.1}, total={}, curve=[{"epoch": 1}], bad=0, seconds=1.5
    )


def packed(step, top1=None):
    """A checkpoint whose weights are its step; one with a top-1 is the end of epoch `step`."""
    curve = [] if top1 is None else [{"epoch": step, "val_top1": top1}]
    at = Progress(step=step, epoch=step, digest=0, sums={}, total={}, curve=curve, bad=0, seconds=0.0)
    return pack(tensors(step), at)


def tensors(value):
    return {"model": {"w": torch.full((2, 3), float(value))}, "momentum": {"w": torch.zeros(2, 3)}}


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "run"))


def test_the_latest_checkpoint_comes_back_bit_for_bit(storage):
    checkpoints = Checkpoints(storage, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(pack(tensors(step), progress(step)))
    found = checkpoints.latest()
    assert found.progress == progress(15)
    assert torch.equal(found.tensors["model"]["w"], torch.full((2, 3), 15.0))
    kept = ["checkpoints/step-000000010-0000.000", "checkpoints/step-000000015-0000.000"]  # keep = 2
    assert checkpoints.names() == kept
    assert not [n for n in storage.names() if "step-000000005" in n]


def break_manifest(storage, name):
    storage.write(f"{name}/manifest.json", b'{"files": {"tens')


def break_tensors(storage, name):
    data = storage.read(f"{name}/{TENSORS}")
    storage.write(f"{name}/{TENSORS}", data[:-1] + bytes([data[-1] ^ 1]))


def lose_tensors(storage, name):
    storage.remove(f"{name}/{TENSORS}")


def lose_manifest(storage, name):
    storage.remove(f"{name}/manifest.json")


def strange_manifest(storage, name):
    storage.write(f"{name}/manifest.json", b'["no files"]')


@pytest.mark.parametrize("damage", [break_manifest, break_tensors, lose_tensors, lose_manifest, strange_manifest])
def test_a_damaged_checkpoint_is_passed_over(storage, damage):
    warnings = []
    checkpoints = Checkpoints(storage, keep=5, warn=warnings.append)
    checkpoints.save(packed(5))
    damage(storage, checkpoints.save(packed(10)))
    assert checkpoints.latest().progress.step == 5
    # Without a manifest it is no checkpoint at all: a writer was killed. All other damage is worth a word.
    assert len(warnings) == (damage is not lose_manifest)
    assert all("step-000000010-0000.000 is damaged" in w for w in warnings)


def old(storage, step, model):
    """A checkpoint as it was before: no writer in its name, tensors in torch's own format, no top-1."""
    stream, name = io.BytesIO(), f"checkpoints/step-{step:09d}"
    torch.save({"model": model, "momentum": {}}, stream)
    known = {key: value for key, value in asdict(progress(step)).items() if key != "interval"}
    files = {"tensors.pt": stream.getvalue(), "progress.json": json.dumps(known).encode()}
    listed = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    for file, data in [*files.items(), ("manifest.json", json.dumps({"files": listed}).encode())]:
        storage.write(f"{name}/{file}", data)
    return name


def test_nothing_but_tensors_is_ever_unpickled(storage, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    old(storage, 5, Evil())
    warnings = []
    assert Checkpoints(storage, keep=5, warn=warnings.append).latest() is None
    assert len(warnings) == 1
    assert not (tmp_path / "executed").exists()


def test_checkpoints_of_older_versions_are_gone_on_from(storage):
    name = old(storage, 5, {"w": torch.ones(3)})
    checkpoints = Checkpoints(storage, keep=2)
    found = checkpoints.latest()
    assert (found.name, found.progress, step_of(name)) == (name, progress(5), 5)
    assert torch.equal(found.tensors["model"]["w"], torch.ones(3))
    assert checkpoints.best() is None
    new = checkpoints.save(packed(5))  # the same step: whoever has a number wrote later
    assert checkpoints.names() == [name, new]


def test_names_are_ordered_by_step_then_by_writer(storage):
    for step, number, attempt in [(5, 2, 0), (5, 1, 12), (5, 1, 3), (4, 9, 9), (1000, 1, 0), (5, 12345, 1234)]:
        Checkpoints(storage, keep=9, owner=Owner(number, attempt)).save(packed(step))
    names = [name.removeprefix("checkpoints/step-") for name in Checkpoints(storage, keep=9).names()]
    assert names == [
        "000000004-0009.009",
        "000000005-0001.003",
        "000000005-0001.012",
        "000000005-0002.000",
        "000000005-12345.1234",
        "000001000-0001.000",
    ]


def test_the_manifest_says_step_writer_and_top1(storage):
    name = Checkpoints(storage, keep=1, owner=Owner(7, 2)).save(packed(3, 0.5))
    manifest = json.loads(storage.read(f"{name}/manifest.json"))
    sizes = {file: len(storage.read(f"{name}/{file}")) for file in manifest["files"]}
    assert (manifest["step"], manifest["number"], manifest["top1"]) == (3, 7, 0.5)
    assert sizes == {file: entry["bytes"] for file, entry in manifest["files"].items()}


@pytest.mark.parametrize(
    ("change", "top1"),
    [
        ({}, 0.5),
        ({"sums": {"steps": 0, "loss": 0.0}, "interval": {"steps": 0}}, 0.5),
        ({"sums": {"steps": 1}}, None),  # a step of the next epoch is done
        ({"interval": {"steps": 1}}, None),
        ({"curve": []}, None),  # the first epoch
        ({"curve": [{"epoch": 2, "val_top1": 0.5}, {"epoch": 3, "train_loss": 1.0}]}, None),  # was not evaluated
        ({"curve": [{"epoch": 2, "val_top1": 0.5}]}, None),
    ],
)
def test_a_state_has_a_top1_where_exactly_it_was_evaluated(change, top1):
    at = {"step": 33, "epoch": 3, "digest": 0, "sums": {}, "total": {}, "bad": 0, "seconds": 0.0}
    curve = [{"epoch": 2, "val_top1": 0.7}, {"epoch": 3, "val_top1": 0.5}]
    assert Progress(**at | {"curve": curve} | change).top1 == top1


def test_the_best_is_the_earliest_of_the_highest(storage):
    checkpoints = Checkpoints(storage, keep=1)
    for step, top1 in [(1, 0.3), (2, 0.6), (3, 0.6), (4, None), (5, 0.1)]:
        checkpoints.save(packed(step, top1))
    assert [step_of(name) for name in checkpoints.names()] == [2, 5]
    assert Checkpoints(storage, keep=1).best().progress.step == 2  # another process reads the manifests
    assert checkpoints.best_name() == "checkpoints/step-000000002-0000.000"


def test_a_best_one_that_is_damaged_is_passed_over(storage):
    checkpoints = Checkpoints(storage, keep=5, warn=lambda _: None)
    checkpoints.save(packed(1, 0.4))
    break_tensors(storage, checkpoints.save(packed(2, 0.6)))
    assert checkpoints.best().progress.step == 1


@settings(max_examples=40, deadline=None)
@given(
    saves=st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from([None, 0.1, 0.2, 0.3]), st.booleans()), min_size=1, max_size=12
    ),
    keep=st.integers(1, 4),
)
def test_the_newest_and_the_best_are_kept_and_nothing_else(tmp_path_factory, saves, keep):
    """Any steps, any scores, any restarts between them, with what a killed writer leaves each time."""
    storage = Storage(str(tmp_path_factory.mktemp("run")))
    step, owner, made = 0, Owner(1, 0), {}
    for distance, top1, restarted in saves:
        step += distance
        if restarted:
            storage.write(f"checkpoints/step-{step:09d}-{owner.number:04d}.{owner.attempt:03d}/{TENSORS}", b"half")
            owner = Owner(owner.number + 1, 0) if distance == 1 else Owner(owner.number, owner.attempt + 1)
        made[Checkpoints(storage, keep, owner=owner).save(packed(step, top1))] = top1
        best = max((t for t in made.values() if t is not None), default=None)
        wanted = list(made)[-keep:] + [name for name, t in made.items() if t is not None and t == best][:1]
        assert set(storage.folders("checkpoints")) == set(wanted)
        assert Checkpoints(storage, keep).latest().progress.step == step


def test_what_a_killed_writer_left_goes_and_a_later_writer_is_left_alone(storage, tmp_path):
    """A local write is staged in a file that no listing shows: that goes too."""
    left, later = "checkpoints/step-000000002-0003.001", "checkpoints/step-000000009-0003.003"
    for folder in (left, later, "checkpoints/notes"):
        (tmp_path / "run" / folder).mkdir(parents=True)
        (tmp_path / "run" / folder / f"{TENSORS}#1").write_bytes(b"half")
    name = Checkpoints(storage, keep=1, owner=Owner(3, 2)).save(packed(5))
    assert set(storage.folders("checkpoints")) == {name, later, "checkpoints/notes"}


def test_a_save_lists_its_folder_once(storage, monkeypatch):
    listed, whole = [], Storage.folders
    monkeypatch.setattr(Storage, "folders", lambda self, prefix: listed.append(prefix) or whole(self, prefix))
    checkpoints = Checkpoints(storage, keep=1)
    for step in range(1, 5):
        checkpoints.save(packed(step, 0.1 * step))
    assert listed == ["checkpoints"] * 4


def test_a_bucket_is_asked_as_seldom_as_a_folder(tmp_path, monkeypatch):
    """A save: its three objects, one listing; what goes: its manifest, and the rest with one request."""
    with S3Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        checkpoints = Checkpoints(Storage(server.url), keep=1, owner=Owner(1))
        for step, top1 in [(1, 0.5), (2, 0.3), (3, None)]:
            server.behave()
            last = checkpoints.save(packed(step, top1))
        assert Counter(request.method for request in server.log) == {"PUT": 3, "GET": 1, "POST": 2}
        assert [step_of(name) for name in checkpoints.names()] == [1, 3]
        again = Checkpoints(Storage(server.url), keep=1)
        assert (again.latest().name, again.best().progress.step) == (last, 1)


def test_a_writer_that_lost_the_run_leaves_nothing(storage):
    def lost():
        raise ClusterError("run 'a' was taken over by another driver; this one stops")

    good = Checkpoints(storage, keep=5, owner=Owner(1)).save(packed(5))
    with pytest.raises(ClusterError, match=r"^run 'a' was taken over by another driver; this one stops$"):
        Checkpoints(storage, keep=5, owner=Owner(1, 1, lost)).save(packed(6))
    assert set(storage.folders("checkpoints")) == {good}


# -- room --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_is_not_begun(storage, monkeypatch):
    checkpoints = Checkpoints(storage, keep=5)
    good, size = checkpoints.save(packed(5)), packed(6).nbytes
    monkeypatch.setattr(Storage, "free", lambda _: int(1.04 * size))
    monkeypatch.setattr(Storage, "write", None)
    with pytest.raises(
        ClusterError,
        match=rf"^cluster.storage: {storage.place} has 0.0 MB free, a checkpoint takes 0.0 MB; free some, or move the "
        rf"run to a larger cluster.storage; the last good checkpoint is {good}$",
    ):
        checkpoints.save(packed(6))
    monkeypatch.undo()
    monkeypatch.setattr(Storage, "free", lambda _: int(1.06 * size))
    checkpoints.save(packed(6))


@pytest.mark.parametrize("file", [TENSORS, "progress.json", "manifest.json"])
def test_a_write_that_fails_half_way_leaves_the_one_before(storage, monkeypatch, file):
    checkpoints = Checkpoints(storage, keep=1)
    good, write = checkpoints.save(packed(5)), Storage.write

    def full(self, name, data):
        if name.endswith(file):
            raise ClusterError("cluster.storage: no space left on device")
        write(self, name, data)

    monkeypatch.setattr(Storage, "write", full)
    with pytest.raises(ClusterError, match=rf"no space left on device; the last good checkpoint is {good}$"):
        checkpoints.save(packed(6))
    assert set(storage.folders("checkpoints")) == {good}
    assert checkpoints.latest().progress.step == 5


def test_a_disk_that_is_full_leaves_the_one_before(small_disk):
    """A real one: the room is looked at, then somebody else takes it."""
    storage = Storage(str(small_disk / "run"))
    checkpoints = Checkpoints(storage, keep=1)
    good, free = checkpoints.save(packed(5)), storage.free()
    big = pack({"model": {"w": torch.zeros(free // 5)}}, progress(6))  # 4 bytes each
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "free", lambda _: (small_disk / "other").write_bytes(bytes(free // 2)) and free)
        with pytest.raises(ClusterError, match=rf"cannot be written: no space left on device; the last .* is {good}$"):
            checkpoints.save(big)
    assert set(storage.folders("checkpoints")) == {good}
    assert checkpoints.latest().progress.step == 5
    with pytest.raises(ClusterError, match=r"has \d.* MB free, a checkpoint takes .* MB; free some"):
        checkpoints.save(big)
    (small_disk / "other").unlink()
    assert step_of(checkpoints.save(big)) == 6


# -- killed writers ----------------------------------------------------------------------------------------------------

WRITER = """
import sys, torch
from orchestrator.state.checkpoints import Checkpoints, Owner
from orchestrator.state.packed import Progress, pack
from orchestrator.state.storage import Storage

place, first, attempt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
checkpoints = Checkpoints(Storage(place), keep=2, owner=Owner(1, attempt))
for step in range(first, 10**6):
    at = Progress(step=step, epoch=0, digest=0, sums={}, total={}, curve=[], bad=0, seconds=0.0)
    packed = pack({"model": {"w": torch.full((2_000_000,), float(step))}, "momentum": {}}, at)
    print("begins", step, flush=True)
    checkpoints.save(packed)
    print("whole", step, flush=True)
"""


def lines_until(process, *wanted):
    for line in process.stdout:
        if line.split() == [*wanted]:
            return
    raise AssertionError(f"the writer ended before {wanted}")


@pytest.mark.slow
def test_a_killed_writer_never_costs_more_than_what_it_was_writing(tmp_path, storage):
    """SIGKILL at many moments of a save, each time in the same folder: the newest whole one is always found."""
    at, random = 0, Random(0)
    for attempt in range(12):
        arguments = [sys.executable, "-c", WRITER, storage.place, str(at + 1), str(attempt)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
            lines_until(writer, "begins", str(at + 3))
            threading.Event().wait(random.uniform(0, 0.03))  # somewhere in this save, or in the next
            writer.kill()
            told = [line.split() for line in writer.stdout]
        whole = max([at + 2, *(int(step) for word, step in told if word == "whole")])
        found = Checkpoints(storage, keep=2, warn=pytest.fail).latest()
        assert found.progress.step in (whole, whole + 1)  # its manifest may be there, and its word not
        assert torch.equal(found.tensors["model"]["w"], torch.full((2_000_000,), float(found.progress.step)))
        at = found.progress.step
    Checkpoints(storage, keep=2, owner=Owner(2)).save(packed(at + 1))
    assert len(list((tmp_path / "run").rglob("*"))) == 1 + 2 * 4  # nothing that the killed ones left


def test_weights_sha256_sees_names_shapes_and_bits():
    state = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int64)}
    same = {"a": torch.zeros(3, dtype=torch.int64), "b": torch.ones(2)}  # the order of a dict means nothing
    assert weights_sha256(state) == weights_sha256(same)
    others = [
        {**state, "b": torch.ones(2).nextafter(torch.tensor(2.0))},
        {**state, "b": torch.ones(2, 1)},
        {"a": state["a"], "c": state["b"]},
        {**state, "b": torch.ones(2, dtype=torch.float64)},
    ]
    assert len({weights_sha256(s) for s in [state, *others]}) == 5


def test_create_refuses_to_replace(storage):
    assert storage.create("x/y", b"1")
    assert not storage.create("x/y", b"2")
    assert storage.read("x/y") == b"1"
    assert storage.read("none") is None


def test_a_name_belongs_to_one_identity(storage):
    config = RunConfig(name="a")
    assert admit(storage, config, "digest") is None
    write_record(storage, record_of(config, "digest", "run-id"))
    assert admit(storage, config.replace({"cluster.workers": "2"}), "digest").mlflow_run_id == "run-id"
    with pytest.raises(ConfigError, match=r"name 'a' belongs to another run .*: optim.lr was 0.1, is 0.2; use those"):
        admit(storage, config.replace({"optim.lr": 0.2}), "digest")
    with pytest.raises(ConfigError, match="the dataset's digest was digest, is other"):
        admit(storage, config, "other")


def test_a_damaged_run_json_is_named_and_a_damaged_result_is_none(storage):
    storage.write("run.json", b"{")
    with pytest.raises(DataError, match=r"run.json is damaged, .*remove the run's folder, or use another --name"):
        admit(storage, RunConfig(name="a"), "digest")
    for torn in (b"", b"{", b'{"status": "finished"}', b"[]"):
        storage.write("result.json", torn)
        assert read_result(storage) is None


def test_a_study_is_no_run(storage):
    storage.write("study.json", b"{}")
    with pytest.raises(ConfigError, match=r"name 'a' is a study in .*; use another --name"):
        admit(storage, RunConfig(name="a"), "digest")


def test_run_json_is_readable_by_people_and_scripts(storage, tmp_path):
    write_record(storage, record_of(RunConfig(name="a"), "digest", None))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["model.depth"] == 50
    assert settings["data.scale"] == [0.08, 1.0]
