"""The plan: who plays which lane, how much of the workers' time is used, and what a dry run says."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import settings
from orchestrator.config import RunConfig
from orchestrator.plan import OFFICIAL, Counts, describe, efficiency, lanes_of, learning_rate, make_plan
from orchestrator.settings import recipe_names
from pipelines.errors import ConfigError


@pytest.mark.parametrize(
    ("lanes", "world", "shares"),
    [
        (8, 1, [8]),
        (8, 3, [3, 3, 2]),
        (8, 5, [2, 2, 2, 1, 1]),
        (4, 4, [1, 1, 1, 1]),
        (256, 7, [37, 37, 37, 37, 36, 36, 36]),
    ],
)
def test_lanes_are_dealt_in_runs(lanes, world, shares):
    assert [len(lanes_of(rank, world, lanes)) for rank in range(world)] == shares


@given(st.integers(1, 300), st.data())
def test_every_lane_is_played_once_in_order(lanes, data):
    world = data.draw(st.integers(1, lanes))
    dealt = [lane for rank in range(world) for lane in lanes_of(rank, world, lanes)]
    assert dealt == list(range(lanes))


@pytest.mark.parametrize(
    ("lanes", "world", "share"), [(8, 1, 1.0), (8, 3, 8 / 9), (8, 5, 0.8), (8, 7, 8 / 14), (8, 8, 1.0)]
)
def test_efficiency(lanes, world, share):
    assert efficiency(lanes, world) == pytest.approx(share)


def test_paper_arithmetic():
    # 1,281,167 images at 256 a step: 5,004 full steps; 90 epochs are 450,360.
    config = RunConfig().replace({"data.streams": 1})
    plan = make_plan(config, OFFICIAL["imagenet"])
    assert (plan.steps_per_epoch, plan.steps, plan.micro_batch) == (5004, 450_360, 32)
    assert plan.parameters == 25_557_032
    rate = learning_rate(config, plan.steps_per_epoch)
    assert [round(rate(s), 6) for s in (0, 30 * 5004 - 1, 30 * 5004, 60 * 5004)] == [0.1, 0.1, 0.01, 0.001]


def test_the_papers_cifar10_divides_its_rate_at_32k_and_48k_steps():
    own = settings.parser("", "")
    config = settings.load(["--recipe", "cifar10"], own, settings.Edge(Path("/home")))[1]
    plan = make_plan(config, OFFICIAL["cifar10"])
    rate = learning_rate(config, plan.steps_per_epoch)
    marks = (0, 31_999, 32_000, 47_999, 48_000, plan.steps - 1)
    assert [round(rate(step), 6) for step in marks] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert abs(plan.steps - 64_000) < plan.steps_per_epoch
    assert (plan.augment.kind, plan.augment.pad, plan.augment.size, plan.augment.flip) == ("pad_crop", 4, 32, True)
    assert (config.optim.weight_decay, config.optim.decay_norm, config.optim.momentum) == (1e-4, True, 0.9)


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_the_papers_cifar_nets_are_the_recipes(depth, parameters):
    own = settings.parser("", "")
    flags = ["--recipe", "cifar10", "--model.depth", str(depth)]
    config = settings.load(flags, own, settings.Edge(Path("/home")))[1]
    assert make_plan(config, OFFICIAL["cifar10"]).parameters == parameters


def test_too_small_a_dataset_is_refused_by_setting():
    with pytest.raises(ConfigError, match=r"train.global_batch = 256, .* do not fit 100 training samples"):
        make_plan(RunConfig(), Counts((50, 50), 10, 10))


def test_a_warm_up_that_does_not_fit_the_schedule_is_refused():
    config = RunConfig().replace({"optim.schedule": "one_cycle", "optim.warmup_epochs": 5})
    with pytest.raises(ConfigError, match=r"optim.schedule is one_cycle"):
        learning_rate(config, 100)


# PAPER.md, "Recipes worth shipping": (steps an epoch are arithmetic) what each dry run has to say.
SAYS = {
    "tv1": ["resnet-50", "8 lanes x 32 images = 256 a step", "450,", "0.1 at step 0", "0.001 at step"],
    "goyal": ["256 lanes x 32 images = 8192 a step", "0.1 at step 0"],
    "nvidia90": ["8 lanes x 256 images = 2048 a step", "0 at step 0"],
    "paper": ["resnet-34, shortcut A", "21,623,848 parameters", "120 epochs"],
    "cifar10": [
        "resnet-20, shortcut A, 269,722 parameters",
        "2 lanes x 64 images = 128 a step",
        "390 steps",
        "164 epochs = 63,960 steps",
        "0.1 at step 31,980",
        "0.01 at step 47,970",
        "0.001 at step 63,959",
    ],
    "cifar10-short": ["resnet-20, shortcut A", "2 lanes x 64 images = 128 a step", "4 epochs"],
    "digits": ["resnet-18, shortcut A", "4 lanes x 16 images = 64 a step", "6 epochs"],
    "digits-quick": ["4 lanes x 16 images = 64 a step"],
}


@pytest.mark.parametrize("recipe", recipe_names())
def test_dry_run_of_every_recipe_imports_no_vendor(recipe, tmp_path):
    code = (
        "import sys; from jobs.train import main; "
        f"code = main(['--recipe', '{recipe}', '--dry-run']); "
        "heavy = {'torch', 'ray', 'mlflow', 'sklearn', 'nvidia.dali'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"SKIPLANE_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    for words in SAYS[recipe]:
        assert words in done.stdout


def test_describe_shows_one_worker_less():
    config = RunConfig().replace({"cluster.workers": "3"})
    text = describe(config, make_plan(config, OFFICIAL["imagenet"]), OFFICIAL["imagenet"])
    assert "workers    3: lanes 3 + 3 + 2, 89% of their time used" in text
    assert "workers    2: lanes 4 + 4, 100% of their time used" in text
    assert "not packed yet" in text
