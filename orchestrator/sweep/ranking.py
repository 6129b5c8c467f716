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
    ended = [trial for trial in trials if _counts(trial, metric)]
    others = [trial for trial in trials if not _counts(trial, metric)]
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
    ended = [trial for trial in known if _counts(trial, metric)]
    front: list[Trial] = []
    for trial in sorted(ended or known, key=lambda t: (cost(t), -_score(t, metric), t.id)):
        if not front or _score(trial, metric) > _score(front[-1], metric):
            front.append(trial)
    return front


def time_left(trials: Sequence[Trial], total: int, concurrent: int) -> float | None:
    """Seconds until `total` trials are over, `concurrent` at a time; None while nothing tells how fast they are.

    An epoch counts as long as it took in the trials of the same net, else in all, by the clock of their reports.
    Trials that are over count by the epochs that were *planned*: the share that is stopped early is expected to stay as
    it is. Trials that are not drawn yet are expected to be as those that are.
    """
    paces = {net: pace for net in {t.net for t in trials} if (pace := _pace([t for t in trials if t.net == net]))}
    mean = _pace(trials)
    if mean is None:
        return None
    left = [(_own(t) - _done(t)) * paces.get(t.net, mean) for t in trials if not t.over]
    whole = [_own(trial) * paces.get(trial.net, mean) for trial in trials]
    undrawn = max(total - len(trials), 0) * sum(whole) / len(whole)
    return max([(sum(left) + undrawn) / max(concurrent, 1), *left])


def ran_to_its_end(trial: Trial) -> bool:
    """Whether it was trained for all of its epochs: neither stopped, nor a part that another trial took up."""
    return trial.state == "finished" and trial.epoch >= trial.epochs


def _pace(trials: Iterable[Trial]) -> float | None:
    """Seconds an epoch; a failed trial tells nothing."""
    told = [(_spent(t), _own(t) if t.over else _done(t)) for t in trials if t.state != "failed" and _spent(t) > 0]
    epochs = sum(epochs for _, epochs in told)
    return sum(spent for spent, _ in told) / epochs if epochs else None


def _spent(trial: Trial) -> float:
    """Seconds until its last report, its start included; what a fork took over is not."""
    return trial.reports[-1].seconds if trial.reports else 0.0


def _own(trial: Trial) -> int:
    """Epochs that it is to train itself."""
    return max((trial.stop_after or trial.epochs) - _taken_over(trial), 0)


def _done(trial: Trial) -> int:
    return max(trial.epoch - _taken_over(trial), 0)


def _taken_over(trial: Trial) -> int:
    return trial.fork.epoch if trial.fork else 0


def _counts(trial: Trial, metric: str) -> bool:
    return ran_to_its_end(trial) and _known(trial, metric)


def _known(trial: Trial, metric: str) -> bool:
    return _score(trial, metric) > -math.inf


def _score(trial: Trial, metric: str) -> float:
    """More is better; what is unknown or no number is the worst."""
    score = trial.score(metric)
    return -math.inf if score is None or math.isnan(score) else score
