"""Where a run begins that takes up another one's state: `train.fork`, a checkpoint in the folder of its donor.

It holds everything: weights, momentum, position, sums, curve. So with unchanged settings the forked run is the donor
bit for bit; what may be changed is how it goes on from there (optim.*, train.epochs).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from orchestrator.config import RunConfig, identity_difference
from orchestrator.plan import Plan
from orchestrator.state.checkpoints import DAMAGE, NAME, Checkpoints
from orchestrator.state.packed import Checkpoint, Packed, Progress
from orchestrator.state.records import read_record
from orchestrator.state.storage import Storage
from pipelines.errors import ConfigError, DataError

FREE = ("optim.", "train.epochs ", "train.fork ")  # what may differ from the donor's


def check_fork(config: RunConfig, plan: Plan, dataset_digest: str) -> None:
    """What the driver can know of train.fork before anything is contacted or written; all of the checkpoint is read.

    Nothing is looked at where the run has a checkpoint of its own: the donor may be gone by then. Raises ConfigError
    where the donor is another kind of run or the checkpoint is not there, DataError where it is damaged.
    """
    fork = config.train.fork
    if not fork or Checkpoints(Storage(config.folder()), keep=1).names():
        return
    _check_donor(config, dataset_digest)
    check_position(fork, unpack_fork(fork, read_fork(fork)).progress, plan)


def read_fork(fork: str) -> Packed:
    """The checkpoint's files, verified. Raises ConfigError where there is none, DataError where it is damaged."""
    place, name = _parts(fork)
    checkpoints = Checkpoints(Storage(place), keep=1)
    if name not in (names := checkpoints.names()):
        there = f"there are {', '.join(names)}" if names else "there is no checkpoint"
        raise ConfigError(f"train.fork is {fork}, which is no whole checkpoint; in {place} {there}")
    with _readable(fork):
        return checkpoints.verified(name)


def unpack_fork(fork: str, packed: Packed) -> Checkpoint:
    """Its tensors and progress. Raises DataError where the files hold something else."""
    with _readable(fork):
        return packed.unpack(fork)


def check_position(fork: str, progress: Progress, plan: Plan) -> None:
    """Raises DataError for a position of another plan, ConfigError where nothing is left to train."""
    step, steps = progress.step, plan.steps_per_epoch
    if progress.epoch != step // steps:
        raise DataError(
            f"train.fork is {fork}, which stands at step {step} in epoch {progress.epoch + 1}; with {steps} steps an "
            f"epoch there is no such place: it is another run's"
        )
    if step >= plan.steps:
        raise ConfigError(
            f"train.fork is {fork}, which stands after {step / steps:.4g} epochs, and train.epochs is {plan.epochs}: "
            f"nothing is left to train; raise train.epochs, or take an earlier checkpoint"
        )


def check_tensors(fork: str, tensors: Mapping[str, Mapping[str, Any]], model: nn.Module) -> None:
    """Raises DataError where weights or momentum are another net's."""
    own, parameters = model.state_dict(), dict(model.named_parameters())
    weights, momentum = tensors.get("model", {}), tensors.get("momentum", {})
    wrong = sorted(own.keys() ^ weights.keys()) + [n for n in own if n in weights and not _alike(own[n], weights[n])]
    wrong += [f"momentum of {n}" for n in momentum if n not in own or not _alike(parameters.get(n), momentum[n])]
    if wrong:
        raise DataError(f"train.fork is {fork}, whose tensors are not this net's: {wrong[0]}, and {len(wrong)} in all")


def _check_donor(config: RunConfig, dataset_digest: str) -> None:
    """The donor must be the same run but for FREE: the position means nothing in another order of other data."""
    fork = config.train.fork
    place, _ = _parts(fork)
    donor = read_record(Storage(place))
    if donor is None:
        raise ConfigError(f"train.fork is {fork}, and {place} is no run's folder: it has no run.json")
    differences = [text for text in identity_difference(donor.settings, config) if not text.startswith(FREE)]
    if donor.dataset_digest != dataset_digest:
        differences.append(f"the dataset's digest was {donor.dataset_digest[:12]}, is {dataset_digest[:12]}")
    if differences:
        raise ConfigError(
            f"train.fork is {fork}, a run with other settings: {'; '.join(differences)}; only optim.* and train.epochs "
            f"may differ, because it goes on where that run stood, in its order of images"
        )


def _parts(fork: str) -> tuple[str, str]:
    """(the donor's folder or URL, the checkpoint's name in it)."""
    found = re.fullmatch(rf"(.+)/({NAME.pattern})", fork)
    if found is None:
        raise ConfigError(
            f"train.fork is '{fork}', which names no checkpoint; give RUN_FOLDER/checkpoints/step-000000123-0001.001"
        )
    return found[1], found[2]


@contextmanager
def _readable(fork: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"train.fork is {fork}, which is damaged ({cause}); take another checkpoint") from error


def _alike(own: Any, given: Any) -> bool:
    return own is not None and own.shape == given.shape and own.dtype == given.dtype
