"""Scores of weights: exact, the same as in training, and refused where they would be meaningless."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from jobs import evaluate
from orchestrator import worker
from orchestrator.context import LocalContext
from orchestrator.state.checkpoints import Checkpoints, weights_sha256
from orchestrator.state.packed import Progress, pack
from orchestrator.state.records import record_of, write_record
from orchestrator.state.storage import Storage
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from pipelines.quarantine import CHECKSUM
from tests.datasets import garble

SHORT = ("--train.epochs", "1", "--model.width", "4")


@pytest.fixture
def trained(settings_for, home, monkeypatch):
    """A run that was trained, as supervise leaves it: run.json and a checkpoint. Returns its settings and summary."""
    monkeypatch.setenv("SKIPLANE_HOME", str(home))
    torch.set_num_threads(1)
    config = settings_for("--name", "a", *SHORT)
    write_record(Storage(config.folder()), record_of(config, open_dataset(config.data.root).digest, None))
    return config, worker.train(worker.Job(config), LocalContext())


def score(tmp_path, *flags):
    assert evaluate.main([*flags, "--json", str(tmp_path / "score.json")]) == 0
    return json.loads((tmp_path / "score.json").read_text())


def test_a_run_scores_what_its_training_said(trained, tmp_path, capsys):
    config, summary = trained
    found = score(tmp_path, "--run", "a", "--cluster.storage", config.cluster.storage)
    last = summary["curve"][-1]
    assert (found["top1"], found["loss"], found["samples"]) == (last["val_top1"], last["val_loss"], 360)
    assert found["id_digest"] == last["eval_digest"]
    assert found["weights_sha256"] == summary["weights_sha256"]
    assert "centre 16 px" in capsys.readouterr().out  # the protocol stands beside the number


def test_the_best_checkpoint_is_scored_where_it_is_asked_for(trained, tmp_path):
    """A newer and worse one does not take its place."""
    config, summary = trained
    checkpoints = Checkpoints(Storage(config.folder()), keep=1)
    first = checkpoints.latest()
    curve = [{"epoch": 2, "val_top1": 0.0}]
    later = replace(first.progress, step=2 * first.progress.step, epoch=2, curve=curve)
    weights = {name: tensor * 0 for name, tensor in first.tensors["model"].items()}
    checkpoints.save(pack({"model": weights, "momentum": {}}, later))
    place = ("--run", "a", "--cluster.storage", config.cluster.storage)
    assert score(tmp_path, *place, "--best")["weights_sha256"] == summary["weights_sha256"]
    assert score(tmp_path, *place)["weights_sha256"] == weights_sha256(weights)


def test_a_run_without_an_evaluation_has_no_best(settings_for):
    from orchestrator.scoring import weights_of_run

    config = settings_for("--name", "a", *SHORT)
    with pytest.raises(DataError, match=r"run 'a' in .* has no checkpoint$"):
        weights_of_run(config)
    at = Progress(step=3, epoch=0, digest=0, sums={}, total={}, curve=[], bad=0, seconds=0.0)
    Checkpoints(Storage(config.folder()), keep=1).save(pack({"model": {"w": torch.ones(1)}}, at))
    assert weights_of_run(config) == {"w": torch.ones(1)}
    with pytest.raises(DataError, match=r"has no checkpoint that was evaluated; score its newest without --best$"):
        weights_of_run(config, best=True)


def test_a_file_scores_as_its_run_does_at_any_batch(trained, tmp_path):
    config, summary = trained
    from orchestrator.scoring import weights_of_run

    weights = weights_of_run(config)
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
    net = ("--recipe", "digits-quick", "--model.width", "4", "--data", config.data.root)
    found = score(tmp_path, "--weights", str(tmp_path / "w.pt"), *net, "--data.eval_batch", "7")
    assert (found["top1"], found["samples"]) == (summary["curve"][-1]["val_top1"], 360)
    assert found["id_digest"] == summary["curve"][-1]["eval_digest"]


def test_a_bad_image_is_named_beside_the_score(trained, home, tmp_path, capsys):
    """Its neighbour is scored in its place; without a limit that allows it there is no score."""
    config, _ = trained
    dataset = open_dataset(shutil.copytree(home / "data" / "digits", tmp_path / "garbled"))
    garble(dataset, "val", 5)
    flags = ("--run", "a", "--cluster.storage", config.cluster.storage, "--data", str(dataset.root))
    found = score(tmp_path, *flags, "--data.max_bad", "0.003")
    [bad] = found["bad_images"]
    assert (found["samples"], found["bad_samples"]) == (360, 1)
    assert (bad["split"], bad["id"], bad["reason"], bad["replaced_by"]) == ("val", 5, CHECKSUM, 4)
    assert (
        f"  bad image {bad['shard']} {bad['key']} ({CHECKSUM}), replaced by sample 4"
        in capsys.readouterr().out.split("\n")
    )
    with pytest.raises(DataError, match=rf"bad image {bad['key']} in {bad['shard']} .* allows 0 in this split"):
        score(tmp_path, *flags)


def test_weights_for_other_classes_are_refused(trained, tmp_path):
    config, _ = trained
    from orchestrator.scoring import weights_of_run

    weights = weights_of_run(config)
    torch.save({**weights, "fc.weight": torch.zeros(7, 32), "fc.bias": torch.zeros(7)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="the weights are for 7 classes, the dataset has 10"):
        evaluate.main(["--weights", str(tmp_path / "w.pt"), "--recipe", "digits-quick", "--model.width", "4"])


@pytest.mark.parametrize(
    ("flags", "kind", "sentence"),
    [
        ([], ConfigError, "one of --run NAME and --weights FILE is needed"),
        (["--run", "a", "--weights", "b"], ConfigError, "one of --run NAME and --weights FILE is needed"),
        (["--run", "none"], DataError, "run 'none' is not in"),
        (
            ["--best", "--weights", "b"],
            ConfigError,
            "--best chooses among a run's checkpoints; name the run with --run",
        ),
        (["--weights", "/no/such.pt"], ConfigError, "weights file /no/such.pt cannot be used: No such file"),
        (["--weights", __file__], ConfigError, "no file of tensors that torch reads without executing code"),
    ],
)
def test_what_cannot_be_scored_is_refused(home, monkeypatch, flags, kind, sentence):
    monkeypatch.setenv("SKIPLANE_HOME", str(home))
    with pytest.raises(kind, match=sentence):
        evaluate.main(flags)
    assert not (home / "runs").exists()


def test_nothing_in_a_weights_file_is_executed(home, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    monkeypatch.setenv("SKIPLANE_HOME", str(home))
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="without executing code"):
        evaluate.main(["--weights", str(tmp_path / "evil.pt"), "--recipe", "digits-quick"])
    assert not (tmp_path / "executed").exists()
