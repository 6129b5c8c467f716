"""From a draw to a trial: names, costs, parts, and draws that cannot be trained."""

import pytest

from orchestrator.config import RunConfig
from orchestrator.plan import OFFICIAL
from orchestrator.state.storage import Storage
from orchestrator.stop import Stop
from orchestrator.sweep.births import Births, samples_span
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.director import SweepDirector
from orchestrator.sweep.journal import Journal
from orchestrator.sweep.rules import NoRule
from orchestrator.sweep.search import Draw, Listed
from orchestrator.sweep.settings import read
from orchestrator.sweep.trial import Fork, Trial
from orchestrator.tracking import Others
from pipelines.errors import DataError
from tests.test_director import Places


@pytest.fixture
def births(tmp_path):
    base = RunConfig(name="s1").replace({
        "cluster.storage": str(tmp_path), "data.name": "digits", "data.lanes": 4, "train.global_batch": 64,
        "train.epochs": 6, "model.width": 16, "data.size": 16, "data.eval_size": 16, "data.eval_resize": 16,
    })  # fmt: skip
    space = read("", [("depth", "18,34"), ("train.global_batch", "64,128")])
    return Births(base, SweepConfig(workers="18=1,34=2"), space, OFFICIAL["digits"], lambda text: None, Others("off"))


def test_a_trial_has_its_name_its_workers_and_what_its_net_costs(births):
    trial = births.bear(2, Draw({"model.depth": 34, "train.global_batch": 128}))
    assert (trial.id, trial.title, trial.net, trial.epochs) == ("t002", "resnet-34 global_batch=128", "resnet-34", 6)
    assert (trial.workers, trial.state, trial.mlflow_run_id) == ("2", "waiting", None)
    assert trial.multiply_adds > births.bear(1, Draw({"model.depth": 18, "train.global_batch": 128})).multiply_adds > 0
    assert births.epoch_samples(trial) == 11 * 128  # 1,437 images
    grid = births.sweep.model_copy(update={"search": "grid"})
    assert samples_span(births.base, grid, births.space, births.counts) == (1408, 6 * 1408)


def test_a_part_of_a_trial_is_a_run_that_stops_there_and_its_last_one_is_whole(births):
    trial = births.bear(1, Draw({"model.depth": 18, "train.global_batch": 64}))
    assert births.config(trial, 2).train.stop_after == 2
    assert births.config(trial, 6).train.stop_after == 0
    assert births.config(trial).folder() == births.folder(trial)


def test_a_draw_that_does_not_fit_is_born_failed_and_the_sweep_goes_on_and_can_be_taken_up(births, tmp_path):
    bad, good = {"model.depth": 18, "train.global_batch": 63}, {"model.depth": 18, "train.global_batch": 64}
    trial = births.bear(1, Draw(bad))
    assert trial.state == "failed"
    assert "train.global_batch is 63" in trial.reason

    def director():
        return SweepDirector(
            births, Listed([bad, good]), NoRule, "val/top1", Journal(Storage(str(tmp_path / "s1"))), Places(2),
            lambda id, why: None, lambda text: None, lambda trials: None, Stop(),
        )  # fmt: skip

    first = director()
    assert first.next() is None
    assert first.next().id == "t002"
    again = director()
    assert [t.state for t in again.trials] == ["failed", "running"]
    assert again.next().id == "t002"


def test_who_takes_up_a_trial_that_left_nothing_is_told_so(births):
    trial = Trial("t005", {"model.depth": 18}, "", fork=Fork("t001", 2))
    with pytest.raises(DataError, match=r"s1/t001 has no checkpoint at the end of epoch 2, where it is to be taken up"):
        births.config(trial)
