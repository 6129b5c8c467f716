"""From a draw to a trial: its run's settings, its name, what its net costs; and its last words in MLflow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.plan import Counts, Plan, make_plan
from orchestrator.state.checkpoints import Checkpoints, step_of
from orchestrator.state.lease import lease
from orchestrator.state.storage import Storage
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.runs import likely_points, title, trial_config, trial_id
from orchestrator.sweep.search import Draw
from orchestrator.sweep.space import Space
from orchestrator.sweep.training import task
from orchestrator.sweep.trial import Fork, Trial
from orchestrator.tracking import Others, Place, add_last
from pipelines.errors import ConfigError, DataError, SkiplaneError


@dataclass(frozen=True)
class Births:
    """What all trials of a sweep have in common."""

    base: RunConfig
    sweep: SweepConfig
    space: Space
    counts: Counts
    say: Callable[[str], None]
    others: Others
    tags: Mapping[str, str] = field(default_factory=dict)  # of each trial's run
    known: dict[str, int] = field(default_factory=dict)  # trial -> images of its epoch

    def bear(self, number: int, draw: Draw) -> Trial:
        """A new trial; one that cannot be trained is born failed."""
        trial = Trial(trial_id(number), dict(draw.point), "", fork=draw.fork, stop_after=draw.stop_after)
        try:
            config = self.config(trial)
            plan = make_plan(config, self.counts)
        except (ConfigError, DataError) as error:
            words = " ".join(f"{name}={value}" for name, value in draw.point.items())
            return replace(trial, title=words, state="failed", reason=str(error))
        return replace(
            trial, title=title(config, self.space), net=config.model.arch(plan.classes).name,
            epochs=config.train.epochs, workers=config.cluster.workers, parameters=plan.parameters,
            multiply_adds=plan.multiply_adds,
        )  # fmt: skip

    def config(self, trial: Trial, until: int = 0) -> RunConfig:
        """The settings of its run, to be trained `until` so many epochs; 0 = to its end.

        Raises ConfigError, or DataError where what it takes up is gone.
        """
        config = trial_config(self.base, self.sweep, trial.id, trial.config)
        stop_after = until or trial.stop_after
        changes: dict[str, Any] = {"train.stop_after": stop_after if stop_after < config.train.epochs else 0}
        if trial.fork is not None:
            changes["train.fork"] = self._checkpoint(config, trial.fork)
        return config.replace(changes)

    def task(self, trial: Trial, until: int, workers: str) -> str:
        """What a slot is told: its run, until so many epochs, with so many workers. Its journal is sent from here."""
        self.others.follow(Storage(self.folder(trial)))
        config = self.config(trial, until).replace({"cluster.workers": workers})
        return task(config, trial.title, {**self.tags, "skiplane.trial": trial.id})

    def epoch_samples(self, trial: Trial) -> int:
        """Training images of one epoch."""
        if trial.id not in self.known:
            config = trial_config(self.base, self.sweep, trial.id, trial.config)
            self.known[trial.id] = samples_of(make_plan(config, self.counts))
        return self.known[trial.id]

    def folder(self, trial: Trial) -> str:
        """Of its run."""
        return f"{self.base.folder()}/{trial.id}"

    def close(self, trial: Trial) -> None:
        """Why a trial stopped or failed is known here alone; one that never began has nothing in MLflow."""
        uri, storage = self.base.tracking.uri, Storage(self.folder(trial))
        if trial.state == "finished" or uri == "off":
            return self.others.complete(storage)
        status = "FAILED" if trial.state == "failed" else "FINISHED"
        tags = {"skiplane.state": trial.state, "skiplane.reason": (trial.reason or "")[:500]}
        try:
            with lease(storage, trial.id, self.say) as held:
                add_last(Place(storage, held.number), status, tags)
        except SkiplaneError as error:
            self.say(f"tracking: {trial.id} is not marked as {trial.state}: {error}")
        return self.others.complete(storage)

    def _checkpoint(self, config: RunConfig, fork: Fork) -> str:
        """The donor's newest checkpoint at the end of that epoch."""
        place = f"{config.cluster.storage}/{fork.trial}"
        step = fork.epoch * make_plan(config, self.counts).steps_per_epoch
        names = [name for name in Checkpoints(Storage(place), keep=1).names() if step_of(name) == step]
        if not names:
            raise DataError(f"{place} has no checkpoint at the end of epoch {fork.epoch}, where it is to be taken up")
        return f"{place}/{names[-1]}"


def samples_of(plan: Plan) -> int:
    """Training images of one epoch."""
    return plan.steps_per_epoch * plan.micro_batch * plan.order.lanes


def samples_span(base: RunConfig, sweep: SweepConfig, space: Space, counts: Counts) -> tuple[int, int]:
    """(images of the shortest epoch, images of the longest trial), of the trials that are likely."""
    configs = [trial_config(base, sweep, trial_id(1), point) for point in likely_points(space, sweep)]
    known = [(samples_of(make_plan(config, counts)), config.train.epochs) for config in configs]
    return min(each for each, _ in known), max(each * epochs for each, epochs in known)
