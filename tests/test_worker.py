"""The worker without Ray: same samples at any number of processes, exact evaluation, bit-identical recovery."""

import json
import shutil
from contextlib import closing
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator import worker
from orchestrator.context import LocalContext
from orchestrator.plan import counts_of, make_plan
from orchestrator.state.checkpoints import Checkpoints, step_of
from orchestrator.state.storage import Storage
from pipelines.checking import checked
from pipelines.dataset import open_dataset
from pipelines.errors import DataError
from pipelines.quarantine import CHECKSUM
from pipelines.reader import Reader
from pipelines.sources import Item
from tests.datasets import garble
from tests.gloo_group import GlooGroup, train

SHORT = ("--train.epochs", "2", "--model.width", "4")


def run(config, **context):
    torch.set_num_threads(1)
    found = Checkpoints(Storage(config.folder()), keep=2).latest()
    return worker.train(worker.Job(config, found.name if found else None), LocalContext(**context))


class After:
    """Asks for a stop once so many progress records were heard."""

    def __init__(self, count):
        self.left = count

    def hear(self, records):
        self.left -= sum(r["kind"] == "progress" for r in records)

    def __call__(self):
        return self.left <= 0


def test_a_stopped_run_goes_on_bit_for_bit(settings_for):
    whole = run(settings_for("--name", "whole", *SHORT))
    config = settings_for("--name", "cut", *SHORT)
    cut = After(7)
    first = run(config, hear=cut.hear, stop=cut)
    assert (first["status"], 14 <= first["steps"] < 22) == ("stopped", True)
    second = run(config)
    assert second["status"] == "finished"
    for key in ("weights_sha256", "data_digest", "curve", "train_loss_mean", "steps"):
        assert second[key] == whole[key], key


def test_what_is_told_of_the_node_and_of_the_classes(settings_for):
    """Samples again and again, and of the last evaluation alone the exact counts by class."""
    told = []
    config = settings_for("--name", "told", *SHORT, "--tracking.system_seconds", "0.02")
    summary = run(config, hear=told.extend)
    samples = [r for r in told if r["kind"] == "system"]
    assert len(samples) > 1
    assert all(0 <= r["values"]["cpu_percent"] <= 100 for r in samples)
    [classes] = [r for r in told if r["kind"] == "classes"]
    dataset = open_dataset(config.data.root)
    labels = dataset.index("val")["label"]
    assert classes["global_step"] == summary["steps"]
    assert classes["images"] == np.bincount(labels, minlength=len(dataset.classes)).tolist()
    assert sum(classes["right"]) == round(summary["curve"][-1]["val_top1"] * len(labels))


def test_sampling_can_be_turned_off(settings_for):
    told = []
    run(settings_for("--name", "quiet", *SHORT, "--tracking.system_seconds", "0"), hear=told.extend)
    assert not [r for r in told if r["kind"] == "system"]


def test_a_run_that_ends_after_some_epochs_goes_on_bit_for_bit(settings_for):
    whole = run(settings_for("--name", "whole", *SHORT))
    config = settings_for("--name", "parted", *SHORT)
    part = config.replace({"train.stop_after": 1, "train.eval_epochs": 99})
    first = run(part)
    assert (first["status"], first["reason"], first["epochs"]) == ("stopped", "train.stop_after = 1", 1)
    assert "val_top1" in first["curve"][-1]  # its end is evaluated, whatever train.eval_epochs says
    again = run(part)  # nothing is left to do
    assert (again["status"], again["weights_sha256"]) == ("stopped", first["weights_sha256"])
    rest = run(config)
    assert (rest["status"], rest["reason"]) == ("finished", None)
    for key in ("weights_sha256", "data_digest", "curve", "train_loss_mean", "steps"):
        assert rest[key] == whole[key], key


def test_exactly_the_states_that_were_evaluated_have_a_top1(settings_for):
    """Checkpoints in the middle of an epoch do not pass for its end; some are left out where storage is slow."""
    flags = ("--train.checkpoint_steps", "4", "--train.keep", "99", "--tracking.log_steps", "6")
    config = settings_for("--name", "scored", *SHORT, *flags)
    summary, storage = run(config), Storage(config.folder())
    ends = {summary["steps"] // 2 * record["epoch"]: record["val_top1"] for record in summary["curve"]}
    names = Checkpoints(storage, keep=99).names()
    found = {step_of(name): json.loads(storage.read(f"{name}/manifest.json"))["top1"] for name in names}
    assert found == {step: ends.get(step) for step in found}
    assert summary["steps"] in found
    assert len(found) > 2


def test_checkpoints_at_any_interval_leave_the_result_alone(settings_for):
    plain = run(settings_for("--name", "plain", *SHORT))
    often = run(settings_for("--name", "often", *SHORT, "--train.checkpoint_steps", "3", "--tracking.log_steps", "5"))
    assert often["weights_sha256"] == plain["weights_sha256"]
    assert often["curve"] == plain["curve"]


def test_lanes_fused_or_one_by_one_read_the_same_and_learn_alike(settings_for):
    fused = run(settings_for("--name", "fused", *SHORT))
    single = run(settings_for("--name", "single", *SHORT, "--train.lanes_per_pass", "1"))
    assert single["data_digest"] == fused["data_digest"]
    assert single["curve"][0]["train_loss"] == pytest.approx(fused["curve"][0]["train_loss"], rel=0.02)


def test_more_epochs_go_on_where_the_schedule_allows_it(settings_for):
    steps = ("--optim.schedule", "step", "--optim.milestones", "1", "--optim.lr", "0.05", "--model.width", "4")
    whole = run(settings_for("--name", "whole", *steps, "--train.epochs", "2"))
    run(settings_for("--name", "longer", *steps, "--train.epochs", "1"))
    longer = run(settings_for("--name", "longer", *steps, "--train.epochs", "2"))
    assert longer["weights_sha256"] == whole["weights_sha256"]


def test_a_diverging_run_fails_and_says_so(settings_for):
    from pipelines.errors import TrainingError

    config = settings_for("--name", "hot", *SHORT, "--optim.lr", "1000", "--optim.schedule", "constant")
    with pytest.raises(TrainingError, match=r"training diverged at step \d+: .*lower optim.lr"):
        run(config)


def test_colour_noise_and_smoothing_and_clipping_run(settings_for):
    flags = ("--data.pca_colour", "0.1", "--optim.label_smoothing", "0.1", "--optim.clip_norm", "1")
    one = run(settings_for("--name", "one", *SHORT, *flags))
    two = run(settings_for("--name", "two", *SHORT, *flags))
    assert one["weights_sha256"] == two["weights_sha256"]
    plain = run(settings_for("--name", "plain", *SHORT, *flags, "--data.pca_colour", "0"))
    assert plain["weights_sha256"] != one["weights_sha256"]


def test_weights_to_start_from(settings_for, tmp_path):
    first = run(settings_for("--name", "first", *SHORT))
    config = settings_for("--name", "first", *SHORT)
    weights = Checkpoints(Storage(config.folder()), keep=2).latest().tensors["model"]
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
    second = run(settings_for("--name", "second", *SHORT, "--model.init", str(tmp_path / "w.pt")))
    assert second["curve"][0]["train_loss"] < 0.5 * first["curve"][0]["train_loss"]


class InEvaluation:
    """Asks for a stop at a look that comes within an evaluation: the steps are done, and the epoch is not told."""

    def __init__(self, epoch):
        self.epoch, self.told, self.looks = epoch, 0, 0

    def hear(self, records):
        self.told += sum(r["kind"] == "epoch" for r in records)
        if any(r["kind"] == "progress" and r["step"] == r["steps_per_epoch"] for r in records):
            self.looks = 0

    def __call__(self):
        self.looks += 1
        return self.told == self.epoch and self.looks > 1 and self.evaluates

    @property
    def evaluates(self):
        import traceback

        return any(frame.name == "goes_on" for frame in traceback.extract_stack())


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_stop_within_an_evaluation_is_heard_and_whoever_goes_on_evaluates(settings_for, epoch):
    """Of the last epoch, too: all steps are done, and the run is not finished."""
    flags = (*SHORT, "--data.eval_batch", "32")
    whole = run(settings_for("--name", "whole", *flags))
    config, stop = settings_for("--name", "cut", *flags), InEvaluation(epoch)
    first = run(config, hear=stop.hear, stop=stop)
    assert (first["status"], first["steps"], len(first["curve"])) == ("stopped", 22 * (epoch + 1), epoch)
    told = []
    second = run(config, hear=told.extend)
    assert [r["epoch"] for r in told if r["kind"] == "epoch"] == list(range(epoch + 1, 3))
    assert second["status"] == "finished"
    for key in ("weights_sha256", "data_digest", "curve", "train_loss_mean", "steps"):
        assert second[key] == whole[key], key


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["fast", "ordered"])
def test_three_processes_recover_bit_for_bit_from_a_sigkill(settings_for, reduce):
    """Three ranks: DDP lays its buckets anew after its first backward pass, which two ranks cannot tell."""
    flags = (*SHORT, "--train.checkpoint_steps", "5", "--train.reduce", reduce)
    whole = train(settings_for("--name", "whole", *flags), 3)[0]
    config = settings_for("--name", "killed", *flags)
    with GlooGroup(config, 3) as group:
        saved = (r["step"] for r in group.records() if r["kind"] == "checkpoint")
        assert next(step for step in saved if step >= 10) < 44
        group.kill(1)
    again = train(config, 3)[0]
    for key in ("weights_sha256", "data_digest", "curve"):
        assert again[key] == whole[key], key


def test_an_image_that_decodes_silently_wrong_is_told_once_and_replaced_each_time(settings_for, home, tmp_path):
    """The decoder takes it, its checksum does not: one record in two epochs; in evaluation too."""
    dataset = open_dataset(shutil.copytree(home / "data" / "digits", tmp_path / "garbled"))
    with closing(Reader(dataset, "train")) as reader:
        whole = reader.read([5]).image(0).tobytes()
        for split in ("train", "val"):
            garble(dataset, split, 5)
        wrong, name = reader.read([5]).image(0).tobytes(), reader.name(5)
    images = [Item("", 0, lambda data=data: data) for data in (whole, wrong)]
    assert [image.fault for image in checked(images, threads=1)] == ["", ""]
    assert (np.asarray(Image.open(BytesIO(whole))) != np.asarray(Image.open(BytesIO(wrong)))).any()
    config = settings_for("--name", "garbled", *SHORT, "--data.root", str(dataset.root), "--data.max_bad", "0.003")
    heard = []
    summary = run(config, hear=heard.extend)
    bad = [r for r in heard if r["kind"] == "bad"]
    assert [(r["split"], r["id"], r["reason"]) for r in bad] == [("train", 5, CHECKSUM), ("val", 5, CHECKSUM)]
    assert (bad[0]["shard"], bad[0]["key"]) == name
    order = make_plan(config, counts_of(dataset)).order
    fed = [5 in order.ids(epoch, step, range(4)) for epoch in range(2) for step in range(order.steps_per_epoch)]
    assert summary["bad_samples"] == sum(fed) > 0
    with pytest.raises(DataError, match=r"bad image \S+ in train-\d+\.tar \(its bytes do not match"):
        run(config.replace({"name": "strict", "data.max_bad": 1e-4}))


def test_a_shard_that_ends_too_early_is_a_data_error(settings_for, home, tmp_path):
    shutil.copytree(home / "data" / "digits", tmp_path / "torn")
    shard = tmp_path / "torn" / "train-000003.tar"
    shard.write_bytes(shard.read_bytes()[: 40 * 512])
    with pytest.raises(DataError, match=r"shard .*train-000003.tar"):
        run(settings_for("--name", "torn", *SHORT, "--data.root", str(tmp_path / "torn")))
