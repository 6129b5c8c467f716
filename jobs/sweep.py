"""Trains many nets and rates, and says which is best: `python -m jobs.sweep --name s --sweep.lr 0.01:1:log ...`."""

import shlex
from collections.abc import Sequence

from jobs import edge
from orchestrator import settings
from orchestrator.cluster.environment import prepare
from orchestrator.config import RunConfig
from orchestrator.plan import plan_counts
from orchestrator.sweep import outlook
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.runs import flags
from orchestrator.sweep.settings import load
from orchestrator.sweep.space import Space
from orchestrator.sweep.trial import Trial

USAGE = (
    "python -m jobs.sweep [--recipe NAME] [--config FILE.yaml] --name NAME --sweep.DIMENSION VALUES "
    "[--sweep.SETTING VALUE ...] [--SECTION.SETTING VALUE ...] [--dry-run]"
)


def main(argv: list[str]) -> int:
    """Exit codes: 0 finished, 2 setting, 3 data, 4 cluster or tracking, 5 too many failures, 130 or 143 stopped."""
    own = settings.parser("Searches depths, rates, any setting. The same name goes on, or shows the result.", USAGE)
    own.add_argument("--dry-run", action="store_true", help="print the trials and an estimate, contact nothing")
    surroundings = settings.Edge.of_environment()
    args, config, sweep, space = load(argv, own, surroundings)
    if args.dry_run:
        edge.say(dry_run(config, sweep, space))
        return 0
    prepare(surroundings.home)
    from orchestrator import supervise  # ray, torch and mlflow take seconds to import: not for a dry run
    from orchestrator.sweep import sweep as sweeps

    try:
        sweeps.run(
            config, sweep, space, say=edge.say, command=lambda trial, run: command(argv, config.name, trial, run)
        )
    except supervise.Stopped as stopped:
        edge.say(f"stopped; the same command goes on with the sweep in {config.folder()}")
        return 128 + stopped.signum
    return 0


def dry_run(config: RunConfig, sweep: SweepConfig, space: Space) -> str:
    """The trials, and how long they take by a short measurement on this machine: no cluster."""
    from orchestrator.sweep.probe import measure

    trials = outlook.planned(config, sweep, space, plan_counts(config))
    probe = measure(outlook.works(trials), config.cluster.cpus_per_worker)
    return outlook.describe(config, sweep, space, trials, probe)


def command(argv: Sequence[str], sweep: str, trial: Trial, run: RunConfig) -> str:
    """What trains a trial by itself: the sweep's own line, with the trial's settings in the place of the space.

    run: the trial's settings in full; one that took another up begins where it did.
    """
    words = ["python", "-m", "jobs.train", *_without(argv, trial), *flags(trial.config)]
    if run.train.fork:
        words += ["--train.fork", run.train.fork]
    return shlex.join([*words, "--cluster.workers", trial.workers, "--name", f"{sweep}-best"])


def _without(argv: Sequence[str], trial: Trial) -> list[str]:
    """argv without what is the sweep's, and what the trial says otherwise."""
    kept, words = list[str](), iter(argv)
    for word in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        value = [] if equals or name == "dry-run" else [next(words, "")]
        if not (name in ("name", "dry-run", "cluster.workers", *trial.config) or name.startswith("sweep.")):
            kept += [word, *value]
    return kept


if __name__ == "__main__":
    edge.run(main)
