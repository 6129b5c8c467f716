"""Trials on Ray Tune: it places an actor for each trial that runs at a time, and hears of their deaths.

An actor is a *slot*: it trains one trial after the other, because starting a process costs as much as a short trial. A
trial always ends by itself: finished, failed, or asked to stop, with its checkpoint saved. Nothing that Tune writes is
used again: its snapshots leave out what its scheduler knows, and are seconds old when a driver dies.
"""

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster import session
from orchestrator.cluster.slots import Outcome, Slot, Train
from orchestrator.context import Record
from pipelines.errors import ClusterError

# Of a slot with what Ray Train starts beside it: 1.9 GB resident were measured, libraries counted once a process.
SLOT_BYTES = 2 * 10**9
# Tune's own tables, log files and signal handlers are in nobody's interest here.
TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",  # slots that start at once; by default one waits for the other
}


@dataclass(frozen=True)
class Assignment:
    """A trial to train now; `what` is for the function that trains it."""

    id: str
    what: str


class Director(Protocol):
    """Who decides which trials there are. All calls come from the thread that called `run`."""

    def next(self) -> Assignment | None:
        """A trial that can start now; None while there is none."""

    def over(self) -> bool:
        """Whether `next` will give no more."""

    def abandons(self) -> bool:
        """Whether to end now, though some trials have no slot yet: those that have one have ended."""

    def heard(self, id: str, news: list[Record]) -> None:
        """What a trial said."""

    def ended(self, id: str, outcome: Outcome) -> None:
        """A trial ended by itself."""

    def died(self, id: str, why: str) -> None:
        """A trial's slot is gone, or never came to be."""


@ray.remote(num_cpus=0)
class _Board:
    """Where a slot reads whether its trial should end."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}

    def write(self, id: str, why: str) -> None:
        self._words[id] = why

    def read(self, id: str) -> str | None:
        return self._words.get(id)


class Trials:
    """Runs the trials that a director gives, in slots of this cluster. `train` is what a slot does with one."""

    def __init__(self, train: Train) -> None:
        here = ray.get_runtime_context().get_node_id()
        self._train = train
        self._board: Any = _Board.options(  # type: ignore[attr-defined]
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
        ).remote()

    def stop(self, id: str, why: str) -> None:
        """Asks a trial for a checkpoint and an end."""
        self._board.write.remote(id, why)

    def run(self, director: Director) -> None:
        """Until the director has no more and all have ended. Raises what the director raised."""
        os.environ.update(TUNE)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        scratch, heard = tempfile.mkdtemp(prefix="skiplane-tune-"), _Heard(director)
        try:
            tune.Tuner(
                _placed(tune.with_parameters(Slot, train=self._train, board=self._board)),
                param_space={},
                tune_config=tune.TuneConfig(
                    search_alg=_Suggestions(heard),
                    scheduler=_Listener(heard),
                    num_samples=-1,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch,
                    name="trials",
                    verbose=0,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    stop=_Abandonment(heard),
                ),
            ).fit()
        except TuneError as error:
            if heard.error is None:
                raise ClusterError(f"Ray Tune gave up: {str(error).strip().splitlines()[-1]}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if heard.error is not None:
            raise heard.error

    def close(self) -> None:
        """Ends the board's process."""
        with suppress(RayError, ValueError):
            ray.kill(self._board)


def check_room() -> int:
    """How many slots the cluster holds. Raises ClusterError where it holds none."""
    slots = sum(int(node.memory // SLOT_BYTES) for node in session.nodes())
    if slots == 0:
        has = ", ".join(f"{node.address}: {node.memory / 1e9:.1f} GB" for node in session.nodes())
        raise ClusterError(
            f"a trial's driver takes {SLOT_BYTES / 1e9:g} GB of a node's memory, and no node offers that ({has}); "
            f"start Ray with more (ray start --memory BYTES)"
        )
    return slots


def _placed(slot: type[tune.Trainable]) -> Any:
    """Memory is what a slot takes: where that is free it may be, so that not all of them are on the head."""
    bundle = {"memory": float(SLOT_BYTES)}
    return tune.with_resources(slot, tune.PlacementGroupFactory([bundle], strategy="SPREAD"))


class _Heard:
    """A director, and what it raised: Tune makes text of that. Then it is asked no more."""

    def __init__(self, director: Director) -> None:
        self._director = director
        self.error: BaseException | None = None

    def __call__(self, method: str, *values: Any) -> Any:
        if self.error is not None:
            return method in ("over", "abandons") or None
        try:
            return getattr(self._director, method)(*values)
        except BaseException as error:
            self.error = self.error or error
            raise


class _Directed:
    """Has a director, which Tune would copy, and pickle into the records that nobody reads."""

    _director: "_Heard"

    def __deepcopy__(self, _: dict[int, Any]) -> "_Directed":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_director"}


class _Suggestions(_Directed, Searcher):
    """Hands the director's trials to Tune."""

    def __init__(self, director: "_Heard") -> None:
        Searcher.__init__(self, metric=None, mode=None)
        self._director = director

    def suggest(self, trial_id: str) -> Any:
        given = self._director("next")
        if given is not None:
            return {"id": given.id, "what": given.what}
        return Searcher.FINISHED if self._director("over") else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler hears it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the director has a journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Abandonment(_Directed, tune.Stopper):
    """Ends Tune where it would wait for a slot that nobody wants any more."""

    def __init__(self, director: "_Heard") -> None:
        self._director = director

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._director("abandons"))


class _Listener(_Directed, FIFOScheduler):
    """Hands what Tune hears to the director."""

    def __init__(self, director: "_Heard") -> None:
        FIFOScheduler.__init__(self)
        self._director = director

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._director("heard", trial.config["id"], result["news"])
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._director("heard", trial.config["id"], result["news"])
        self._director("ended", trial.config["id"], result["outcome"][0])

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._director("died", trial.config["id"], _last_line(Path(trial.error_file)))


def _last_line(error: Path) -> str:
    """Of what Ray wrote about a slot that is gone."""
    with suppress(OSError):
        lines = [line.strip() for line in error.read_text().splitlines() if line.strip()]
        return lines[-1][:200]
    return "no cause is known"
