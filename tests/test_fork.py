"""train.fork: a run that begins where another one's checkpoint stands, with all that it holds."""

import shutil
from pathlib import Path

import pytest
import torch

from orchestrator import supervise, worker
from orchestrator.context import LocalContext
from orchestrator.plan import counts_of, make_plan
from orchestrator.state.checkpoints import Checkpoints, step_of
from orchestrator.state.fork import check_fork, check_position
from orchestrator.state.packed import pack
from orchestrator.state.records import record_of, write_record
from orchestrator.state.saver import BackgroundSaver
from orchestrator.state.storage import Storage
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from tests.gloo_group import train
from tests.servers import S3Server

SHORT = ("--train.epochs", "2", "--model.width", "4", "--train.keep", "99", "--train.checkpoint_steps", "6")
SAME = ("weights_sha256", "data_digest", "curve", "train_loss_mean", "steps", "bad_samples")
STEPS = 22  # of an epoch


def run(config, **context):
    torch.set_num_threads(1)
    found = Checkpoints(Storage(config.folder()), keep=2).latest()
    return worker.train(worker.Job(config, found.name if found else None), LocalContext(**context))


def digest(config):
    return open_dataset(config.data.root).digest


def stands_at(config, step):
    """train.fork for the checkpoint after so many steps."""
    [name] = [name for name in Checkpoints(Storage(config.folder()), 9).names() if step_of(name) == step]
    return f"{config.folder()}/{name}"


@pytest.fixture(autouse=True)
def every_checkpoint(monkeypatch):
    """None gives way to the next one, however slow the disk is."""
    save = BackgroundSaver.save

    def save_and_wait(self, *arguments):
        save(self, *arguments)
        self.wait()

    monkeypatch.setattr(BackgroundSaver, "save", save_and_wait)


@pytest.fixture
def donor(settings_for):
    """A run that has finished, with its run.json and all its checkpoints; (its settings, its summary)."""
    config = settings_for("--name", "donor", *SHORT)
    summary = run(config)
    write_record(Storage(config.folder()), record_of(config, digest(config), None))
    return config, summary


def check(config):
    check_fork(config, make_plan(config, counts_of(open_dataset(config.data.root))), digest(config))


# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [STEPS, 6, STEPS + 8], ids=["epoch's end", "first epoch", "second epoch"])
def test_unchanged_it_is_its_donor_bit_for_bit(settings_for, donor, step):
    config, whole = donor
    heard = []
    forked = settings_for("--name", "forked", *SHORT, "--train.fork", stands_at(config, step))
    check(forked)
    again = run(forked, hear=heard.extend)
    assert {key: again[key] for key in SAME} == {key: whole[key] for key in SAME}
    [begins] = [r for r in heard if r["kind"] == "restored"]
    assert (begins["global_step"], begins["source"]) == (step, f"from {forked.train.fork}")
    assert [r["epoch"] for r in heard if r["kind"] == "epoch"] == ([1, 2] if step < STEPS else [2])


def test_another_rate_goes_its_own_way_from_there(settings_for, donor):
    config, whole = donor
    fork = stands_at(config, STEPS)
    changed = settings_for("--name", "forked", *SHORT, "--train.fork", fork, "--optim.lr", "0.02")
    check(changed)
    other = run(changed)
    assert other["curve"][0] == whole["curve"][0]
    assert other["curve"][1]["train_loss"] != whole["curve"][1]["train_loss"]
    assert (len(other["curve"]), other["steps"], other["data_digest"]) == (2, 2 * STEPS, whole["data_digest"])
    assert other["weights_sha256"] != whole["weights_sha256"]


def test_more_epochs_may_be_asked_for(settings_for, donor):
    fork = stands_at(donor[0], STEPS)
    longer = settings_for("--name", "forked", *SHORT, "--train.fork", fork, "--train.epochs", "3")
    check(longer)
    assert [record["epoch"] for record in run(longer)["curve"]] == [1, 2, 3]


def test_what_it_saved_itself_comes_first_and_the_donor_may_be_gone(settings_for, donor):
    config, whole = donor
    forked = settings_for("--name", "forked", *SHORT, "--train.fork", stands_at(config, 6))
    heard = []
    first = run(forked, hear=heard.extend, stop=lambda: any(r["kind"] == "epoch" for r in heard))
    assert (first["status"], STEPS < first["steps"] < 2 * STEPS) == ("stopped", True)
    shutil.rmtree(config.folder())
    check(forked)
    again = run(forked)
    assert {key: again[key] for key in SAME} == {key: whole[key] for key in SAME}


def test_a_fork_of_a_fork(settings_for, donor):
    config, whole = donor
    first = settings_for("--name", "first", *SHORT, "--train.fork", stands_at(config, 6))
    run(first)
    write_record(Storage(first.folder()), record_of(first, digest(first), None))
    second = settings_for("--name", "second", *SHORT, "--train.fork", stands_at(first, 24))
    check(second)
    assert run(second)["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_the_donor_may_lie_in_a_bucket(settings_for, donor, monkeypatch):
    config, whole = donor
    with S3Server(Path(config.folder())) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        fork = f"{server.url}/{stands_at(config, STEPS).split('donor/')[1]}"
        forked = settings_for("--name", "forked", *SHORT, "--train.fork", fork)
        assert forked.train.fork.startswith("s3://")
        check(forked)
        assert run(forked)["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_begin_with_the_same_bytes(settings_for):
    """One reads, the other hears of it."""
    config = settings_for("--name", "donor", *SHORT)
    whole = train(config, 2)[0]
    ends = train(settings_for("--name", "forked", *SHORT, "--train.fork", stands_at(config, STEPS + 2)), 2)
    assert [{key: end[key] for key in SAME} for end in ends] == [{key: whole[key] for key in SAME}] * 2


# -- settings ----------------------------------------------------------------------------------------------------------


def test_where_it_lies_is_made_absolute(settings_for, tmp_path, monkeypatch):
    near = settings_for("--train.fork", "runs/a/checkpoints/step-000000006/")
    assert near.train.fork == str(Path.cwd() / "runs/a/checkpoints/step-000000006")
    far = settings_for("--train.fork", "s3://bucket/runs/a/checkpoints/step-000000006/")
    assert far.train.fork == "s3://bucket/runs/a/checkpoints/step-000000006"
    with pytest.raises(ConfigError, match=r"train.fork is 'http://host/x'; use a folder, or s3://BUCKET/PATH"):
        settings_for("--train.fork", "http://host/x")


NOT_THERE = "checkpoints/step-000000007-0001.001"


@pytest.mark.parametrize(
    ("fork", "says"),
    [
        ("{donor}", "train.fork is '{donor}', which names no checkpoint; give RUN_FOLDER/checkpoints/step-0"),
        ("{donor}/" + NOT_THERE, "which is no whole checkpoint; in {donor} there are checkpoints/step-000000006-"),
        ("/no/run/" + NOT_THERE, "train.fork is /no/run/{there}, and /no/run is no run's folder: it has no run.json"),
    ],
)
def test_what_is_no_checkpoint_is_refused(donor, fork, says):
    config = donor[0]
    names = {"donor": config.folder(), "there": NOT_THERE}
    with pytest.raises(ConfigError) as caught:
        check(config.replace({"name": "forked", "train.fork": fork.format(**names)}))
    assert says.format(**names) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.seed": 1}, "a run with other settings: train.seed was 0, is 1; only optim.* and train.epochs may"),
        ({"model.depth": 34, "optim.lr": 0.3}, "other settings: model.depth was 18, is 34; only"),
        ({"train.global_batch": 128, "data.lanes": 8}, "data.lanes was 4, is 8; train.global_batch was 64, is 128; o"),
        ({"model.shortcut": "none"}, "model.shortcut was"),
        ({"train.epochs": 1}, "stands after 1 epochs, and train.epochs is 1: nothing is left to train; raise train.e"),
        ({"optim.lr": 0.3, "optim.schedule": "constant", "train.epochs": 9, "cluster.workers": "2"}, ""),
    ],
)
def test_only_the_optimiser_and_the_epochs_may_differ(donor, changes, says):
    config = donor[0]
    wanted = {"name": "forked", "train.fork": stands_at(config, STEPS), **changes}
    if not says:
        check(config.replace(wanted))
        return
    with pytest.raises(ConfigError) as caught:
        check(config.replace(wanted))
    assert says in str(caught.value)


def test_other_data_is_refused(donor):
    config = donor[0]
    write_record(Storage(config.folder()), record_of(config, "0123456789abcdef", None))
    with pytest.raises(ConfigError, match=r"the dataset's digest was 0123456789ab, is \w{12}; only optim"):
        check(config.replace({"name": "forked", "train.fork": stands_at(config, STEPS)}))


def test_supervise_refuses_before_a_cluster_is_looked_for(donor, tmp_path):
    config = donor[0].replace({"name": "forked", "train.fork": stands_at(donor[0], STEPS), "train.seed": 3})
    with pytest.raises(ConfigError, match=r"train.seed was 0, is 3"):
        supervise.run(config)
    assert not (tmp_path / "runs" / "forked").exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def spoil(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["tensors.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("way", ["garbled", "gone"])
def test_a_damaged_one_is_never_begun_with(donor, file, way):
    """By the driver it is not taken, nor by a worker: it may be damaged in between."""
    config = donor[0]
    forked = config.replace({"name": "forked", "train.fork": stands_at(config, STEPS)})
    path = Path(forked.train.fork) / file
    if way == "garbled":
        spoil(path, at=1 if file == "manifest.json" else -100)
    else:
        path.unlink()
    error, says = DataError, r"train.fork is \S+, which is damaged \(.+\); take another checkpoint"
    if (file, way) == ("manifest.json", "gone"):
        error, says = ConfigError, r"which is no whole checkpoint; in \S+ there are checkpoints/step"
    for refused in (check, run):
        with pytest.raises(error, match=says):
            refused(forked)


def test_a_position_of_another_run_is_refused(donor):
    config = donor[0]
    plan = make_plan(config, counts_of(open_dataset(config.data.root)))
    progress = Checkpoints(Storage(config.folder()), 9).latest().progress
    strange = type(progress)(**{**progress.__dict__, "step": 30, "epoch": 0})
    with pytest.raises(DataError, match=r"train.fork is x, which stands at step 30 in epoch 1; with 22 steps an epoch"):
        check_position("x", strange, plan)


@pytest.mark.parametrize("group", ["model", "momentum"])
def test_tensors_of_another_net_are_refused_by_the_worker(settings_for, donor, group):
    """Whole by its hashes: only the net itself can tell."""
    config = donor[0]
    found = Checkpoints(Storage(config.folder()), 9).load(stands_at(config, STEPS).split("donor/")[1])
    tensors = {**found.tensors, group: {**found.tensors[group], "fc.weight": torch.zeros(3, 4)}}
    made = settings_for("--name", "made", *SHORT)
    name = Checkpoints(Storage(made.folder()), keep=9).save(pack(tensors, found.progress))
    forked = settings_for("--name", "forked", *SHORT, "--train.fork", f"{made.folder()}/{name}")
    with pytest.raises(DataError, match=rf"not this net's: {'momentum of ' * (group == 'momentum')}fc.weight, and 1 i"):
        run(forked)
