"""Trains one net: `python -m jobs.train --recipe digits --name a --model.depth 34 --cluster.workers 2`."""

from collections import Counter
from typing import TYPE_CHECKING

from jobs import edge
from orchestrator import settings
from orchestrator.cluster.environment import prepare
from orchestrator.config import RunConfig, flatten
from orchestrator.plan import describe, make_plan, plan_counts

if TYPE_CHECKING:
    from orchestrator.state.records import Result

USAGE = (
    "python -m jobs.train [--recipe NAME] [--config FILE.yaml] --name NAME [--SECTION.SETTING VALUE ...] [--dry-run]"
)


def main(argv: list[str]) -> int:
    """Exit codes: 0 finished, 2 setting, 3 data, 4 cluster or tracking, 5 training, 130 or 143 stopped."""
    own = settings.parser("Trains one net. The same name again goes on with the same run.", USAGE)
    own.add_argument("--dry-run", action="store_true", help="print settings and plan, contact nothing")
    surroundings = settings.Edge.of_environment()
    args, config = settings.load(argv, own, surroundings)
    if args.dry_run:
        return dry_run(config)
    prepare(surroundings.home)
    from orchestrator import supervise  # ray, torch and mlflow take seconds to import: not for a dry run

    try:
        result = supervise.run(config, say=edge.say)
    except supervise.Stopped as stopped:
        edge.say(f"stopped; the same command goes on from the last checkpoint in {config.folder()}")
        return 128 + stopped.signum
    edge.say(report(result))
    return 0


def dry_run(config: RunConfig) -> int:
    """Prints settings and plan in about a second: no cluster, no vendor."""
    counts = plan_counts(config)
    edge.say("\n".join(f"{name} = {value}" for name, value in flatten(config).items()))
    edge.say("\n" + describe(config, make_plan(config, counts), counts))
    return 0


def report(result: "Result") -> str:
    """The end of a run, for a person."""
    from orchestrator.progress import fetched_line

    bad = Counter(image["split"] for image in result.bad_images)
    rows = {
        "top-1 / top-5": f"{result.top1:.2%} / {result.top5:.2%} of {result.val_samples} validation images"
        + (f", {bad['val']} of them bad and replaced" if bad["val"] else ""),
        "training loss": f"{result.train_loss:.4f} (mean of the last epoch)",
        "weights": f"sha256 {result.weights_sha256}",
        "data read": f"digest {result.data_digest}, {replacements(bad['train'], result.bad_samples)}",
        **({"fetched": fetched_line(result.fetched)} if result.fetched else {}),
        "restarts": str(result.restarts),
        "speed": f"{result.images_per_second:,.0f} img/s" if result.images_per_second else "nothing was left to do",
        "MLflow": result.mlflow_url or "no server: see tracking.uri",
    }
    return f"{result.name} {result.status}\n" + "\n".join(f"  {name:<15}{value}" for name, value in rows.items())


def replacements(images: int, times: int) -> str:
    """How many bad training images there were, and how often one was replaced."""
    if not images:
        return f"{times} times a bad image was replaced"
    return f"{images} bad image{'s' * (images != 1)}, replaced {times} time{'s' * (times != 1)}"


if __name__ == "__main__":
    edge.run(main)
