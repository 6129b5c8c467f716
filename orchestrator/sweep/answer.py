"""What a sweep ends with: a ranking, a picture, a recipe, and the command that trains the best one in full."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator import page
from orchestrator.config import RunConfig, TrackingConfig
from orchestrator.state.records import read_result
from orchestrator.state.storage import Storage
from orchestrator.sweep import figure, ranking, table
from orchestrator.sweep.pbt import lineage
from orchestrator.sweep.recipe import recipe
from orchestrator.sweep.trial import Trial
from orchestrator.tracking import Tracker

RECIPE = "best.yaml"


@dataclass(frozen=True)
class Answer:
    """result.json of a sweep."""

    name: str
    status: str  # finished | stopped | failed
    trials: list[dict[str, Any]]  # by birth
    metric: str
    best: str | None = None  # id of the trial in the first place
    recipe: str | None = None  # its settings, a file for --config
    command: str | None = None  # trains it in full, by itself
    figure: str | None = None  # SVG; a PNG lies beside it
    mlflow_url: str | None = None  # opens all trials, best first
    reason: str | None = None  # why it stopped or failed


def answer(name: str, status: str, trials: Sequence[Trial], metric: str, *, storage: Storage, base: RunConfig,
           command: Callable[[Trial], str], url: str | None, reason: str | None = None) -> Answer:  # fmt: skip
    """Draws and writes, result.json last. base: what all trials have in common."""
    best = ranking.best(trials, metric)
    if best is not None:
        for kind, content in figure.pareto(trials, metric).items():
            storage.write(f"pareto.{kind}", content)
        about = f"Trial {best.id} of sweep {name}: {best.title}, {table.scored(best, metric)}, {best.state}."
        if best.fork is not None:
            about += f"\nIts last part alone: it took up trial {best.fork.trial} after {best.fork.epoch} epochs."
        storage.write(RECIPE, recipe(base, best.config, about).encode())
    found = Answer(
        name, status, [shown(trial) for trial in trials], metric,
        best=best.id if best else None, recipe=f"{storage.place}/{RECIPE}" if best else None,
        command=command(best) if best else None, figure=f"{storage.place}/pareto.svg" if best else None,
        mlflow_url=url, reason=reason,
    )  # fmt: skip
    storage.write("result.json", json.dumps(asdict(found), indent=1).encode())
    return found


def shown(trial: Trial) -> dict[str, Any]:
    """A trial in result.json. Accuracies are fractions."""
    return {
        "id": trial.id, "title": trial.title, "config": trial.config, "state": trial.state, "reason": trial.reason,
        "epochs": trial.epoch, "top1": _finite(trial, "val/top1"), "top5": _finite(trial, "val/top5"),
        "val_loss": _finite(trial, "val/loss"), "train_loss": _finite(trial, "train/loss"), "seconds": trial.seconds,
        "workers": trial.workers, "parameters": trial.parameters, "multiply_adds": trial.multiply_adds,
        "weights_sha256": trial.weights_sha256, "mlflow_run_id": trial.mlflow_run_id,
    }  # fmt: skip


def _finite(trial: Trial, metric: str) -> float | None:
    """JSON has no NaN."""
    value = trial.value(metric)
    return value if value is not None and math.isfinite(value) else None


def say_answer(found: Answer, trials: Sequence[Trial], names: Sequence[str], say: Callable[[str], None]) -> None:
    """For people."""
    say(f"\nSweep {found.name} {found.status}" + (f": {found.reason}" if found.reason else ""))
    if trials:
        say(table.ranking(trials, names, found.metric))
    if found.best is not None:
        say(f"\nFigure: {found.figure} (and .png)\nRecipe: {found.recipe}")
        say(f"The best one by itself, in full:\n  {found.command}")
        if len(parts := lineage(trials, found.best)) > 1:
            say("Its parts: " + ", ".join(f"{part.id} {part.title} to epoch {part.epoch}" for part in parts))
    say(f"Trials: {found.mlflow_url or 'no MLflow server to open them in: see tracking.uri'}")


def track(tracker: Tracker, found: Answer, trials: Sequence[Trial], names: Sequence[str], storage: Storage,
          config: TrackingConfig) -> None:  # fmt: skip
    """The sweep's run in MLflow: table as its description, figure, recipe and result as files, the best one's model."""
    tracker.tags({"skiplane.state": found.status, "skiplane.best": found.best or ""})
    head = _head(found, trials)
    tracker.note(head + table.ranking_markdown(trials, names, found.metric, room=page.LIMIT - len(head)))
    if config.model and found.status == "finished" and found.best and (best := _best_checkpoint(storage, found.best)):
        tracker.model(best, config.register_as, config.alias)
    for name in ("pareto.svg", "pareto.png", RECIPE, "result.json"):
        if content := storage.read(name):
            tracker.file(content, name)


def _head(found: Answer, trials: Sequence[Trial]) -> str:
    """The result first: what is seen before the description is unfolded."""
    parts = [f"[All trials, best first]({found.mlflow_url})"] if found.mlflow_url else []
    if (best := ranking.best(trials, found.metric)) is not None:
        parts.insert(0, f"**Best of {len(trials)} trials: {best.title}, {table.scored(best, found.metric)}**")
        parts += [f"By itself: `{found.command}`", page.image("pareto.svg", "Top-1 beside the net's multiply-adds")]
    return "".join(f"{part}\n\n" for part in parts)


def _best_checkpoint(storage: Storage, trial: str) -> str | None:
    """A trial's, below the sweep's folder."""
    result = read_result(Storage(f"{storage.place}/{trial}"))
    kept = (result.best_checkpoint or result.checkpoint) if result else None
    return f"{trial}/{kept}" if kept else None
