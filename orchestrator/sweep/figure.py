"""The picture of a sweep: what accuracy costs, in use and in training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.figures import open_frame, save, short
from orchestrator.sweep import ranking
from orchestrator.sweep.table import TITLES
from orchestrator.sweep.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAMILIES = {"plain": "#D55E00", "resnet": "#0072B2"}  # told apart by people with any colour vision
FRONT = "#444444"
CROWD = 40  # trials from which on points are small
WIDE = 4.0  # largest cost over smallest from which on the axis is logarithmic


def pareto(trials: Sequence[Trial], metric: str) -> dict[str, bytes]:
    """{"svg": ..., "png": ...}: the newest value of `metric` against multiply-adds, left, and seconds, right.

    A colour for plain and for residual nets; filled points ran to their end, hollow ones did not. The best trial of
    each net bears its depth; the line joins what no other trial beats. The same trials give the same bytes.
    """
    from matplotlib.figure import Figure  # the object interface: no global state, no window

    known = [trial for trial in trials if trial.value(metric) is not None]
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, cost in ((left, ranking.multiply_adds), (right, ranking.seconds)):
        _points(axes, known, metric, cost)
        _front(axes, ranking.pareto(known, metric, cost), metric, cost)
        _depths(axes, ranking.best_of_nets(known, metric), metric, cost)
        _dress(axes, [cost(trial) for trial in known])
    left.xaxis.set_major_formatter(lambda count, _: short(count))
    right.xaxis.set_major_formatter(lambda spent, _: f"{spent:,g}")
    left.set_xlabel("multiply-adds of an image")
    right.set_xlabel("seconds of training")
    left.set_ylabel(f"{TITLES[metric].removesuffix(' %')} (%)" if _is_share(metric) else TITLES[metric])
    _legend(left, known)
    return save(figure)


def _points(axes: "Axes", trials: Sequence[Trial], metric: str, cost: ranking.Cost) -> None:
    size = 42.0 if len(trials) <= CROWD else 16.0
    for family, colour in FAMILIES.items():
        for ended in (False, True):  # what ran to its end lies above
            some = [t for t in trials if _family(t) == family and ranking.ran_to_its_end(t) is ended]
            axes.scatter([cost(t) for t in some], [_height(t, metric) for t in some], s=size, linewidths=1.1,
                         facecolors=colour if ended else "none", edgecolors=colour, alpha=0.8, zorder=3)  # fmt: skip


def _front(axes: "Axes", front: Sequence[Trial], metric: str, cost: ranking.Cost) -> None:
    """A staircase: what is to be had for a cost, and no more until the next trial's."""
    axes.plot([cost(t) for t in front], [_height(t, metric) for t in front], color=FRONT, linewidth=1.2,
              drawstyle="steps-post", zorder=2)  # fmt: skip


def _depths(axes: "Axes", bests: Sequence[Trial], metric: str, cost: ranking.Cost) -> None:
    """Plain nets bear theirs on the left, residual nets on the right: twins cost the same."""
    from matplotlib.patheffects import withStroke

    for trial in bests:
        side, shift = ("right", -5) if _family(trial) == "plain" else ("left", 5)
        axes.annotate(trial.net.rpartition("-")[2], (cost(trial), _height(trial, metric)), xytext=(shift, 4), ha=side,
                      textcoords="offset points", fontsize=9, color=FAMILIES[_family(trial)], zorder=4,
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip


def _dress(axes: "Axes", costs: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if costs and min(costs) > 0 and max(costs) / min(costs) >= WIDE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1, y=0.08)
    open_frame(axes)


def _legend(axes: "Axes", trials: Sequence[Trial]) -> None:
    """Only what is there."""
    from matplotlib.lines import Line2D

    def mark(colour: str, label: str, face: str) -> Line2D:
        return Line2D([], [], linestyle="none", marker="o", color=colour, markerfacecolor=face, label=label)

    families = {_family(trial) for trial in trials}
    names = {"plain": "plain nets", "resnet": "residual nets"}
    marks = [mark(colour, names[name], colour) for name, colour in FAMILIES.items() if name in families]
    if not all(map(ranking.ran_to_its_end, trials)):
        marks.append(mark(FRONT, "not run to the end", "none"))
    marks.append(Line2D([], [], color=FRONT, linewidth=1.2, label="not beaten by another"))
    axes.figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)


def _family(trial: Trial) -> str:
    return "plain" if trial.net.startswith("plain") else "resnet"


def _is_share(metric: str) -> bool:
    return metric.startswith("val/top")


def _height(trial: Trial, metric: str) -> float:
    value = trial.value(metric)
    return float("nan") if value is None else 100.0 * value if _is_share(metric) else value
