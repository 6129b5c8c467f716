"""A sweep as text: how it stands, for a terminal or a job's log; the final ranking, there and in Markdown."""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from orchestrator.figures import markdown_lines, short, text_table
from orchestrator.progress import clock
from orchestrator.sweep import ranking as order
from orchestrator.sweep.trial import Trial

WIDTH, GAP = 110, 2  # columns of a line; between the columns of the table
SETTING = 20  # characters of a setting's value
STATE = 16  # columns that a trial's state gets at least; settings make room for it
MANY = 24  # trials that are all shown while the sweep runs
BEST = 5  # shown of more, besides those that run
TITLES = {"val/top1": "top-1 %", "val/top5": "top-5 %", "val/loss": "val loss", "train/loss": "train loss"}
NET = ("model.depth", "model.shortcut")  # what a net's name says already
BOUND = "\N{NO-BREAK SPACE}"
WORDS = ("trial", "net", "state")  # columns that are no numbers

Column = tuple[str, Callable[[Trial], str]]  # title, cell


def progress(
    name: str, trials: Sequence[Trial], names: Sequence[str], metric: str, *, total: int, left_s: float | None
) -> str:
    """How the sweep `name` stands: one line, and a table of its trials.

    `names` are the dotted names of the settings that vary; `total` trials will be drawn; `left_s` is ranking.time_left.
    Of more than 24 trials the table has those that run and the best five. Plain text, 110 columns at most.
    """
    shown = trials if len(trials) <= MANY else _telling(trials, metric)
    lines = [headline(name, trials, metric, total=total, left_s=left_s)]
    if shown:
        lines.append(_text(shown, names, [("epoch", _epoch), _metric(metric)]))
    if len(shown) < len(trials):
        lines.append(f"{len(shown)} of {len(trials)} trials are shown; in all {_counts(trials)}")
    return "\n".join(lines)


def headline(name: str, trials: Sequence[Trial], metric: str, *, total: int, left_s: float | None) -> str:
    """sweep s1: 5 of 12 trials over (2 stopped early, 1 failed), 2 running, best resnet-34 lr=0.1 98.3 %, 3:20 left"""
    states, over = Counter[str](trial.state for trial in trials), sum(trial.over for trial in trials)
    ends = [f"{states[s]} {text}" for s, text in (("stopped", "stopped early"), ("failed", "failed")) if states[s]]
    parts = [f"{over} of {total} trials over" + (f" ({', '.join(ends)})" if ends else "")]
    if states["running"]:
        parts.append(f"{states['running']} running")
    if first := order.best(trials, metric):
        parts.append(f"best {first.title} {scored(first, metric)}")
    if left_s is not None and over < total:
        parts.append(f"{clock(left_s)} left")
    return _wrapped(f"sweep {name}: {', '.join(parts)}")


def ranking(trials: Sequence[Trial], names: Sequence[str], metric: str) -> str:
    """The final table, best first, and below it the trials that no other one beats at their cost."""
    placed = order.placed(trials, metric)
    return "\n\n".join(
        [_text(placed, names, _final(placed, metric), _places(placed)), *map(_wrapped, fronts(trials, metric))]
    )


def ranking_markdown(trials: Sequence[Trial], names: Sequence[str], metric: str, room: int) -> str:
    """The same for MLflow's description of a run, `room` characters at most: rows that do not fit are counted."""
    placed = order.placed(trials, metric)
    columns = [*_places(placed), *_head(), *_settings(placed, names), *_final(placed, metric), ("state", _state)]
    head, rule, *rows = markdown_lines([title for title, _ in columns], _cells(placed, columns))
    below = "".join(f"\n\n{line}" for line in fronts(trials, metric))
    for kept in range(len(rows), -1, -1):
        more = f"\n\n... and {len(rows) - kept} more" if kept < len(rows) else ""
        text = "\n".join([head, rule, *rows[:kept]]) + more + below
        if len(text) <= room:
            return text
    return text[:room]


def fronts(trials: Sequence[Trial], metric: str) -> list[str]:
    """A sentence for each cost: the trials that no other one beats in both accuracy and that cost, cheap ones first."""
    sentences = []
    for name, cost in (("multiply-adds", order.multiply_adds), ("seconds", order.seconds)):
        if front := order.pareto(trials, metric, cost):
            points = (f"{t.id} {t.title} ({scored(t, metric)}, {_cost(name, cost(t))})" for t in front)
            sentences.append(f"Not beaten in both {TITLES[metric].removesuffix(' %')} and {name}: {', '.join(points)}")
    return sentences


def value(trial: Trial, metric: str) -> str:
    """For a table: '98.33' for an accuracy, in per cent; '0.0512' for a loss; empty where nothing was heard."""
    found = trial.value(metric)
    if found is None:
        return ""
    return f"{100 * found:.2f}" if metric.startswith("val/top") else f"{found:.4f}"


def scored(trial: Trial, metric: str) -> str:
    """For a sentence: '98.3 %', 'val loss 0.0512'."""
    found = trial.value(metric)
    if found is not None and metric.startswith("val/top"):
        return f"{100 * found:.1f} %"
    return f"{TITLES[metric]} {value(trial, metric)}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """{"optim.lr": "lr", ...}; the whole name where two would be alike."""
    ends = Counter(name.rpartition(".")[2] for name in names)
    return {name: end if ends[end := name.rpartition(".")[2]] == 1 else name for name in names}


def _text(
    trials: Sequence[Trial], names: Sequence[str], middle: Sequence[Column], before: Sequence[Column] = ()
) -> str:
    """The table; settings from the last on give way to the state, and are named below it."""
    settings, left_out = _settings(trials, names), list[str]()
    wanted = min(STATE, max(len(_state(trial)) for trial in trials))
    while True:
        columns = [*before, *_head(), *settings, *middle]
        rows = _cells(trials, columns)
        room = WIDTH - 2 - sum(GAP + max(map(len, cells)) for cells in zip([t for t, _ in columns], *rows, strict=True))
        if room >= wanted or not settings:
            break
        left_out.insert(0, settings.pop()[0])
    rows = [[*row, _cut(_state(trial), max(room, wanted))] for row, trial in zip(rows, trials, strict=True)]
    text = text_table(None, [*(title for title, _ in columns), "state"], rows, left=WORDS, width=WIDTH, tight=True)
    return text + ("\n" + _wrapped(f"not shown for want of room: {', '.join(left_out)}") if left_out else "")


def _head() -> list[Column]:
    return [("trial", lambda trial: trial.id), ("net", lambda trial: trial.net)]


def _settings(trials: Sequence[Trial], names: Sequence[str]) -> list[Column]:
    """A column for each setting that varies, but for those that follow from the net's name; and for unlike workers."""
    shown = [name for name in names if name not in NET or not _follows(trials, name)]
    titles = short_names(shown)
    columns = [(titles[name], _setting(name)) for name in shown]
    if len({trial.workers for trial in trials}) > 1:
        columns.append(("workers", lambda trial: trial.workers))
    return columns


def _follows(trials: Sequence[Trial], name: str) -> bool:
    """Whether trials of the same net have the same value."""
    return len({(trial.net, trial.config.get(name)) for trial in trials}) == len({trial.net for trial in trials})


def _final(trials: Sequence[Trial], metric: str) -> list[Column]:
    """What the answer is made of; a sweep by another metric shows the accuracy besides."""
    scores = [_metric(key) for key in dict.fromkeys([metric, "val/top1"])]
    costs: list[Column] = [
        ("mult-adds", lambda t: short(t.multiply_adds)),
        ("seconds", lambda t: f"{t.seconds:.0f}"),
    ]
    return [("epochs", _epoch), *scores, *costs]


def _metric(key: str) -> Column:
    return TITLES[key], lambda trial: value(trial, key)


def _setting(name: str) -> Callable[[Trial], str]:
    return lambda trial: _cut(_shown(trial.config.get(name)), SETTING)


def _places(placed: Sequence[Trial]) -> list[Column]:
    places = {trial.id: str(place) for place, trial in enumerate(placed, 1)}
    return [("place", lambda trial: places[trial.id])]


def _cells(trials: Iterable[Trial], columns: Sequence[Column]) -> list[list[str]]:
    return [[cell(trial) for _, cell in columns] for trial in trials]


def _telling(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Of many: those that run, and the best."""
    best = {trial.id for trial in order.placed(trials, metric)[:BEST]}
    return [trial for trial in trials if trial.state == "running" or trial.id in best]


def _counts(trials: Iterable[Trial]) -> str:
    return ", ".join(f"{count} {state}" for state, count in Counter(trial.state for trial in trials).most_common())


def _epoch(trial: Trial) -> str:
    return f"{trial.epoch}/{trial.epochs}"


def _state(trial: Trial) -> str:
    return trial.state + (f": {' '.join(trial.reason.split())}" if trial.reason else "")


def _cost(name: str, cost: float) -> str:
    return short(cost) if name == "multiply-adds" else f"{cost:.0f} s"


def _wrapped(text: str) -> str:
    """Numbers stay with their units."""
    bound = re.sub(r"(?<=\d) (?=[MGks]\b|%)", BOUND, text)
    return textwrap.fill(bound, WIDTH, subsequent_indent="  ", break_on_hyphens=False).replace(BOUND, " ")


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."


def _shown(value: Any) -> str:
    """A setting's value, short; empty where a trial does not have it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
