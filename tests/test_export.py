"""A checkpoint's net for others: the same bits at any batch, what it says of itself, what is refused."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from orchestrator import worker
from orchestrator.context import LocalContext
from orchestrator.export import export
from orchestrator.state.checkpoints import Checkpoints, weights_sha256
from orchestrator.state.storage import Storage
from orchestrator.training.models.resnet import build
from orchestrator.training.models.weights import load_weights
from orchestrator.training.pixels import Pixels
from pipelines.batches import EvalBatches
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from pipelines.quarantine import Quarantine
from pipelines.reader import Reader
from tests import saved

NET = ("--model.width", "4")


@pytest.fixture
def run(settings_for):
    """Settings of a run with three checkpoints: the best, a worse one, and one in mid-epoch."""
    torch.set_num_threads(1)
    config = settings_for("--name", "a", *NET, "--train.keep", "3")
    saved.record(config)
    names = [saved.checkpoint(config, step, top1, seed=step) for step, top1 in ((1, 0.9), (2, 0.5), (3, None))]
    return config, names


def pixels(count, side=16, seed=0):
    return torch.randint(0, 256, (count, side, side, 3), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_bits_are_those_of_the_net_in_evaluation(run, count):
    config, names = run
    images, found = pixels(count), export(config.folder(), names[1])
    net = build(config.model.arch(10), seed=9).eval()
    load_weights(net, saved.weights(config, seed=2))
    with torch.inference_mode():
        prepared = Pixels(config.data.mean, config.data.std, torch.device("cpu"), interleaved=True)(images, 1)
        expected = net(prepared)
    logits = found.module(images)
    assert torch.equal(logits, expected)
    assert len(logits.unique(dim=0)) == count  # the images do matter
    assert (logits.dtype, logits.shape, logits.requires_grad) == (torch.float32, (count, 10), False)


def test_it_scores_what_training_said(settings_for):
    """Over the images as evaluation decodes them."""
    config = settings_for("--name", "a", *NET, "--train.epochs", "1")
    saved.record(config)
    summary = worker.train(worker.Job(config), LocalContext())
    found, dataset = export(config.folder()), open_dataset(config.data.root)
    own = {"resize": found.resize, "size": found.size, "batch_size": 64, "device": torch.device("cpu")}
    with closing(Reader(dataset, "val")) as reader:
        told = Quarantine(0, lambda _: None)
        with EvalBatches(reader, range(360), **own, decode="cpu", threads=1, quarantine=told) as batches:
            right = sum(int((found.module(b.images).argmax(1) == b.labels).sum()) for b in batches)
    assert right / 360 == summary["curve"][-1]["val_top1"] == found.top1
    assert found.weights_sha256 == summary["weights_sha256"]


def test_the_best_is_taken_and_said(run):
    config, names = run
    found, dataset = export(config.folder()), open_dataset(config.data.root)
    assert (found.checkpoint, found.step, found.top1) == (names[0], 1, 0.9)
    assert found.weights_sha256 == weights_sha256(saved.weights(config, seed=1))
    assert found.weights_sha256 == weights_sha256(found.module.net.state_dict())
    assert (found.class_names, found.unnamed) == (tuple("0123456789"), "")
    assert (found.dataset_digest, found.run, found.net) == (dataset.digest, "a", "resnet-18")
    assert (tuple(found.example.shape), found.example.dtype) == ((2, 16, 16, 3), torch.uint8)
    about = found.about()
    assert about["class_names"] == list("0123456789")
    assert "module" not in about


def test_without_an_evaluation_the_newest_is_taken(settings_for):
    config = settings_for("--name", "a", *NET)
    saved.record(config)
    names = [saved.checkpoint(config, step, None) for step in (1, 2)]
    assert export(config.folder()).checkpoint == names[1]


def test_a_damaged_best_is_passed_over_and_named(run):
    config, names = run
    Path(config.folder(), names[0], "tensors.safetensors").write_bytes(b"torn")
    heard = []
    assert export(config.folder(), warn=heard.append).checkpoint == names[1]
    assert names[0] in heard[0]
    with pytest.raises(DataError, match=rf"^{names[0]} in .*/runs/a is damaged; those that are kept: {names[0]}, "):
        export(config.folder(), names[0], heard.append)


def test_without_its_dataset_the_classes_have_no_names(settings_for, home, tmp_path):
    """Their number is the head's. Another dataset in its place does not name them."""
    shutil.copytree(home / "data" / "digits", tmp_path / "data")
    config = settings_for("--name", "a", *NET, "--data.root", str(tmp_path / "data"))
    saved.record(config)
    saved.checkpoint(config, 1, 0.5)
    document = tmp_path / "data" / "dataset.json"
    document.write_text(document.read_text().replace('"0"', '"zero"'))
    found = export(config.folder())
    assert (found.classes, found.class_names) == (10, ())
    assert "holds another dataset" in found.unnamed
    shutil.rmtree(tmp_path / "data")
    found = export(config.folder())
    assert (found.module(pixels(1)).shape, found.class_names) == ((1, 10), ())
    assert found.unnamed.startswith(f"the dataset cannot be opened: {tmp_path / 'data'} does not exist")


def test_what_cannot_be_exported_is_refused(run, settings_for):
    config, names = run
    with pytest.raises(DataError, match=r"run 'b' is not in .*/runs/b: it has no run.json"):
        export(config.cluster.storage + "/b")
    gone = "checkpoints/step-000000007-0000.000"
    with pytest.raises(DataError, match=rf"^{gone} is not in .*/runs/a; those that are kept: {', '.join(names)}$"):
        export(config.folder() + "/", gone)
    empty = settings_for("--name", "c", *NET)
    saved.record(empty)
    with pytest.raises(DataError, match=r"run in .*/runs/c has no checkpoint; let it train to its first one"):
        export(empty.folder())


def test_weights_of_another_net_are_refused(run):
    config, _ = run
    wider = config.replace({"name": "a", "model.width": 8})
    name = saved.checkpoint(wider, 9, None)
    assert Checkpoints(Storage(config.folder()), 3).load(name) is not None
    with pytest.raises(ConfigError, match="the weights do not fit this net"):
        export(config.folder(), name)
