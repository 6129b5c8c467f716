"""Checkpoints and records: what is whole is found, what is torn is passed over, a name keeps its identity."""

import json

import pytest
import torch

from orchestrator.config import RunConfig
from orchestrator.state.checkpoints import BackgroundSaver, Checkpoints, Progress, weights_sha256
from orchestrator.state.records import admit, read_result, record_of, write_record
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError, ConfigError, DataError


def progress(step):
    return Progress(
        step=step, epoch=0, digest=2**64 - step, sums={"a": 0.1}, total={}, curve=[{"epoch": 1}], bad=0, seconds=1.5
    )


def tensors(value):
    return {"model": {"w": torch.full((2, 3), float(value))}, "momentum": {"w": torch.zeros(2, 3)}}


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "run"))


def test_the_latest_checkpoint_comes_back_bit_for_bit(storage):
    checkpoints = Checkpoints(storage, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(tensors(step), progress(step))
    found = checkpoints.latest()
    assert found.progress == progress(15)
    assert torch.equal(found.tensors["model"]["w"], torch.full((2, 3), 15.0))
    assert checkpoints.names() == ["checkpoints/step-000000010", "checkpoints/step-000000015"]  # keep = 2
    assert not [n for n in storage.names() if "step-000000005" in n]


def break_manifest(storage, name):
    storage.write(f"{name}/manifest.json", b'{"files": {"tens')


def break_tensors(storage, name):
    data = storage.read(f"{name}/tensors.pt")
    storage.write(f"{name}/tensors.pt", data[:-1] + bytes([data[-1] ^ 1]))


def lose_tensors(storage, name):
    storage.remove(f"{name}/tensors.pt")


def lose_manifest(storage, name):
    storage.remove(f"{name}/manifest.json")


def strange_manifest(storage, name):
    storage.write(f"{name}/manifest.json", b'["no files"]')


@pytest.mark.parametrize("damage", [break_manifest, break_tensors, lose_tensors, lose_manifest, strange_manifest])
def test_a_damaged_checkpoint_is_passed_over(storage, damage):
    warnings = []
    checkpoints = Checkpoints(storage, keep=5, warn=warnings.append)
    checkpoints.save(tensors(5), progress(5))
    damage(storage, checkpoints.save(tensors(10), progress(10)))
    assert checkpoints.latest().progress.step == 5
    # Without a manifest it is no checkpoint at all: a writer was killed. All other damage is worth a word.
    assert len(warnings) == (damage is not lose_manifest)
    assert all("step-000000010 is damaged" in w for w in warnings)


def test_nothing_but_tensors_is_ever_unpickled(storage):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    checkpoints = Checkpoints(storage, keep=5, warn=lambda _: None)
    checkpoints.save({"model": Evil()}, progress(5))
    assert checkpoints.latest() is None


def test_the_saver_keeps_what_was_true_when_it_was_asked(storage):
    weights, saved = torch.zeros(1000), []
    saver = BackgroundSaver(Checkpoints(storage, keep=2))
    saver.save({"model": {"w": weights}}, progress(1), saved.append)
    weights += 1  # the next step
    saver.close()
    assert saved == ["checkpoints/step-000000001"]
    assert Checkpoints(storage, keep=2).latest().tensors["model"]["w"].sum() == 0


def test_a_save_that_fails_is_not_silent(tmp_path):
    (tmp_path / "run").mkdir()
    storage = Storage(str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder is needed")
    saver = BackgroundSaver(Checkpoints(storage, keep=2))
    saver.save({"model": {}}, progress(1), print)
    with pytest.raises(ClusterError, match="cannot be written"):
        saver.close()


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
