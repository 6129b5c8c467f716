"""Plain and residual nets trained alike, beside the paper: `python -m jobs.study --recipe digits --name demo`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from jobs import edge
from orchestrator import settings, study
from orchestrator.cluster.environment import prepare
from orchestrator.config import RunConfig, flatten
from orchestrator.plan import describe, make_plan, plan_counts

USAGE = (
    "python -m jobs.study [--recipe NAME] [--config FILE.yaml] --name NAME [--nets LIST] [--seeds N] "
    "[--SECTION.SETTING VALUE ...] [--dry-run]"
)


def main(argv: list[str]) -> int:
    """Exit codes: 0 finished, 2 setting, 3 data, 4 cluster or tracking, 5 training, 130 or 143 stopped."""
    own = settings.parser("Trains plain and residual nets alike. The same name goes on, or shows the result.", USAGE)
    own.add_argument("--nets", default=study.DEFAULT_NETS, help=f"nets to train (default {study.DEFAULT_NETS})")
    own.add_argument("--seeds", type=int, default=1, metavar="N", help="of each net, from train.seed on (default 1)")
    own.add_argument("--dry-run", action="store_true", help="print the runs, settings and plans, contact nothing")
    surroundings = settings.Edge.of_environment()
    args, config = settings.load(argv, own, surroundings)
    nets = study.parse_nets(args.nets)
    if args.dry_run:
        return dry_run(config, study.children(config, nets, args.seeds))
    prepare(surroundings.home)
    from orchestrator import supervise  # ray, torch and mlflow take seconds to import: not for a dry run
    from orchestrator.cluster.crews import Crews
    from orchestrator.cluster.session import session

    crews, stops = Crews(), (KeyboardInterrupt, supervise.Stopped)

    @contextmanager
    def cluster() -> Iterator[None]:
        with session(config.cluster.cpus, edge.say), crews:
            yield

    train = partial(supervise.run, crews=crews)
    try:
        study.run(config, nets, args.seeds, say=edge.say, train=train, cluster=cluster, stops=stops)
    except supervise.Stopped as stopped:
        edge.say(f"stopped; the same command goes on from the last checkpoint in {config.folder()}")
        return 128 + stopped.signum
    return 0


def dry_run(config: RunConfig, runs: list[RunConfig]) -> int:
    """Prints the runs, their common settings and the plan of each: no cluster, no vendor."""
    counts = plan_counts(config)
    edge.say("\n".join(f"{name} = {value}" for name, value in flatten(config).items()))
    for child in runs:
        edge.say(f"\n{child.name}\n{describe(child, make_plan(child, counts), counts)}")
    return 0


if __name__ == "__main__":
    edge.run(main)
