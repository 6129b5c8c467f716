"""Which trials are best, which are worth their cost, and how long the others will still take. Pure."""

import math
from collections.abc import Callable, Iterable, Sequence

from orchestrator.sweep.trial import Trial

Cost = Callable[[Trial], float]


def multiply_adds(trial: Trial) -> float:
    """The cost of using the net: multiply-adds of one image forward."""
    return trial.multiply_adds


def seconds(trial: Trial) -> float:
    """The cost of having it: seconds of training and evaluation, so far."""
    return trial.seconds or (trial.reports[-1].seconds if trial.reports else 0.0)


def ranked(trials: Iterable[Trial], metric: str) -> list[Trial]:
    """Best first by the newest report, whatever became of the trial; ties by fewer multiply-adds, then by id.

    Trials without a value, or with one that is not a number, come last.
    """
    return sorted(trials, key=lambda trial: (-_score(trial, metric), trial.multiply_adds, trial.id))


def placed(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The final places: `ranked`, but a trial that ran to its end stands before one that did not."""
    ended = [trial for trial in trials if _ran_to_its_end(trial, metric)]
    others = [trial for trial in trials if not _ran_to_its_end(trial, metric)]
    return ranked(ended, metric) + ranked(others, metric)


def best(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The first place: a trial that ran to its end, or, where none has, the best of those that reported anything."""
    return next((trial for trial in placed(trials, metric) if _known(trial, metric)), None)


def best_of_nets(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The best trial of each net, best first; nets of which nothing was heard are left out."""
    nets: dict[str, list[Trial]] = {}
    for trial in trials:
        nets.setdefault(trial.net, []).append(trial)
    return placed([first for same in nets.values() if (first := best(same, metric))], metric)


def pareto(trials: Sequence[Trial], metric: str, cost: Cost) -> list[Trial]:
    """The trials that no other one beats in both cost and score, from cheap to dear.

    Only those that ran to their end count, where there are any: a trial that was stopped after a moment is cheap, and
    its cheapness is of no use. Of equals the first by id stands for all.
    """
    known = [trial for trial in trials if _known(trial, metric)]
    ended = [trial for trial in known if _ran_to_its_end(trial, metric)]
    front: list[Trial] = []
    for trial in sorted(ended or known, key=lambda t: (cost(t), -_score(t, metric), t.id)):
        if not front or _score(trial, metric) > _score(front[-1], metric):
            front.append(trial)
    return front


def time_left(trials: Sequence[Trial], total: int, concurrent: int) -> float | None:
    """Seconds until `total` trials are over, `concurrent` at a time; None while nothing tells how fast they are.

    An epoch counts as long as it took in the trials of the same net, else in all. Ended trials count by the epochs
    that were *planned*, so that the share that is stopped early is expected to go on; failed ones do not count. Trials
    that are not drawn yet are expected to be as those that are.
    """
    paces = {net: pace for net in {t.net for t in trials} if (pace := _pace([t for t in trials if t.net == net]))}
    mean = _pace(trials)
    if mean is None:
        return None
    left = [_epochs_left(trial) * paces.get(trial.net, mean) for trial in trials if not trial.over]
    whole = [_planned(trial) * paces.get(trial.net, mean) for trial in trials]
    undrawn = max(total - len(trials), 0) * sum(whole) / len(whole)
    return max([(sum(left) + undrawn) / max(concurrent, 1), *left])


def _pace(trials: Iterable[Trial]) -> float | None:
    """Seconds an epoch, starts included: of the planned ones for trials that are over, of those done for others."""
    heard = [t for t in trials if t.reports and t.state != "failed"]
    told = [(t.reports[-1].seconds, _planned(t) if t.over else t.epoch) for t in heard]
    epochs = sum(epochs for _, epochs in told)
    return sum(spent for spent, _ in told) / epochs if epochs else None


def _planned(trial: Trial) -> int:
    return trial.stop_after or trial.epochs


def _epochs_left(trial: Trial) -> int:
    return max(_planned(trial) - max(trial.epoch, trial.fork.epoch if trial.fork else 0), 0)


def _ran_to_its_end(trial: Trial, metric: str) -> bool:
    return trial.state == "finished" and _known(trial, metric)


def _known(trial: Trial, metric: str) -> bool:
    return _score(trial, metric) > -math.inf


def _score(trial: Trial, metric: str) -> float:
    """More is better; what is unknown or no number is the worst."""
    score = trial.score(metric)
    return -math.inf if score is None or math.isnan(score) else score
