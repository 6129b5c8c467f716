"""Scores weights exactly: `python -m jobs.evaluate --run a` or `--weights resnet50.pth --recipe tv1 --data DATASET`."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import edge
from orchestrator import settings
from orchestrator.config import RunConfig
from pipelines.errors import ConfigError
from pipelines.remote.url import is_url

if TYPE_CHECKING:
    from orchestrator.scoring import Score

USAGE = (
    "python -m jobs.evaluate (--run NAME [--best] | --weights FILE [--recipe NAME]) [--data DATASET] [--json FILE] "
    "[settings]"
)


def main(argv: list[str]) -> int:
    """Exit codes: 0 scored, 2 setting, 3 data."""
    own = settings.parser("Scores weights: each validation image once, the protocol beside the number.", USAGE)
    own.add_argument("--run", metavar="NAME", help="a run in cluster.storage: its settings and newest checkpoint")
    own.add_argument("--best", action="store_true", help="of the run's checkpoints the one with the best top-1")
    own.add_argument(
        "--weights", metavar="FILE", help="a state dict with torchvision's names; say the net with --model.*"
    )
    own.add_argument("--data", metavar="DATASET", help="another dataset than the settings name")
    own.add_argument("--json", type=Path, metavar="FILE", help="write the score there as well")
    surroundings = settings.Edge.of_environment()
    args, config = settings.load(argv, own, surroundings)
    if bool(args.run) == bool(args.weights):
        raise ConfigError("one of --run NAME and --weights FILE is needed")
    if args.best and not args.run:
        raise ConfigError("--best chooses among a run's checkpoints; name the run with --run NAME")
    if args.json and not args.json.expanduser().absolute().parent.is_dir():
        raise ConfigError(f"--json is {args.json}, whose folder does not exist; name a file in a folder that does")
    found = _score(args, config, surroundings)
    edge.say(table(found))
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return 0


def _score(args: Namespace, config: RunConfig, at: settings.Edge) -> "Score":
    import torch

    from orchestrator import scoring
    from orchestrator.training.models.weights import read_weights

    state: dict[str, torch.Tensor]
    if args.run:
        config = scoring.config_of_run(config, args.run)
        state = scoring.weights_of_run(config, best=args.best)
    else:
        state = read_weights(args.weights)
    if args.data:
        config = settings.resolve(config.replace({"data.root": args.data}), at)
    if not is_url(config.data.root) and not Path(config.data.root).exists():
        raise ConfigError(f"data.root is {config.data.root}, which does not exist; name a dataset with --data")
    device = torch.device("cuda" if torch.cuda.is_available() and config.cluster.device != "cpu" else "cpu")
    return scoring.score(config, state, device)


def table(score: "Score") -> str:
    """The score for a person, a line for each bad image below it."""
    from orchestrator.state.register import BadImage

    rows = {
        "top-1": f"{score.top1:.3%}  (error {1 - score.top1:.3%})",
        "top-5": f"{score.top5:.3%}  (error {1 - score.top5:.3%})",
        "loss": f"{score.loss:.4f} nat",
        "images": f"{score.samples:,}, each once; {score.bad_samples} bad ones replaced; id digest {score.id_digest}",
        "protocol": f"short side {score.resize} px, centre {score.crop} px, {score.decode} decode, {score.precision}",
        "weights": f"sha256 {score.weights_sha256}",
        "dataset": f"digest {score.dataset_digest}",
    }
    lines = [f"  {name:<10}{value}" for name, value in rows.items()]
    return "\n".join([score.net, *lines, *(f"  bad image {BadImage(**bad)}" for bad in score.bad_images)])


if __name__ == "__main__":
    edge.run(main)
