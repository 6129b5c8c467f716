"""The command that a sweep prints: the sweep's own line, with the trial's settings in the place of the space."""

import shlex

import pytest

from jobs.sweep import command
from orchestrator.config import RunConfig
from orchestrator.sweep.trial import Trial

TRIAL = Trial("t003", {"model.depth": 34, "optim.lr": 0.1}, "resnet-34 lr=0.1", workers="2")
END = "--model.depth 34 --optim.lr 0.1 --cluster.workers 2 --name s1-best"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("--recipe digits --sweep.depth 18,34 --sweep.lr 0.1,1 --name s1", "--recipe digits "),
        ("--recipe=digits --sweep.depth=18,34 --name=s1 --sweep.trials 3", "--recipe=digits "),
        ("--sweep.space /tmp/space.yaml --config a.yaml --name s1 --dry-run", "--config a.yaml "),
        (
            "--config sweep.yaml --sweep.depth 18,34 --data.name name --train.epochs 5",
            "--config sweep.yaml --data.name name --train.epochs 5 ",
        ),
        ("--optim.lr 0.3 --model.depth=50 --cluster.workers 1..2 --optim.momentum 0.8", "--optim.momentum 0.8 "),
        ("--cluster.storage '/my runs' --sweep.max-failures 2", "--cluster.storage '/my runs' "),
    ],
)
def test_what_is_the_sweeps_goes_and_the_rest_stays(line, kept):
    assert command(shlex.split(line), "s1", TRIAL, RunConfig()) == f"python -m jobs.train {kept}{END}"


def test_a_trial_that_took_up_another_begins_there():
    run = RunConfig().replace({"train.fork": "/runs/s1/t001/checkpoints/step-000000022-0001.001"})
    assert command([], "s1", TRIAL, run).endswith(
        f"--optim.lr 0.1 --train.fork {run.train.fork} --cluster.workers 2 --name s1-best"
    )
