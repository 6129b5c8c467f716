"""What a study shows to people: the table beside the paper's, and the paper's Figure 4."""

import io
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# He et al. 2015, Table 2: top-1 error on ImageNet's validation set, 10-crop, option A, per cent.
PAPER_TABLE_2 = {("plain", 18): 27.94, ("plain", 34): 28.54, ("resnet", 18): 27.88, ("resnet", 34): 25.03}
TITLES = ("net", "training loss", "val error %", "paper, ImageNet %", "parameters", "multiply-adds", "seconds")
# From shallow to deep, told apart by people with any colour vision, and in grey print by their darkness.
COLOURS = ("#56B4E9", "#D55E00", "#009E73", "#882255", "#332288")
WIDTH = 140  # wide enough for several seeds; lines end where the table does


class NetRun(Protocol):
    """One trained net, as figures need it. Losses in nats, errors in per cent, times in seconds."""

    @property
    def name(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def plain(self) -> bool: ...
    @property
    def train_loss(self) -> float: ...
    @property
    def val_error(self) -> float: ...
    @property
    def parameters(self) -> int: ...
    @property
    def multiply_adds(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def curve(self) -> list[dict[str, float]]: ...


def by_net(runs: Iterable[NetRun]) -> dict[str, list[NetRun]]:
    """Runs of the same net (other seeds) together, in the order they came."""
    nets: dict[str, list[NetRun]] = {}
    for run in runs:
        nets.setdefault(run.name, []).append(run)
    return nets


def cells(runs: Sequence[NetRun]) -> list[tuple[str, ...]]:
    """The table's cells, a row for each net; with several seeds the mean and, in brackets, the range."""
    rows: list[tuple[str, ...]] = []
    for name, same in by_net(runs).items():
        first = same[0]
        paper = PAPER_TABLE_2.get(("plain" if first.plain else "resnet", first.depth))
        rows.append((
            name, spread([r.train_loss for r in same], "{:.3f}"), spread([r.val_error for r in same], "{:.1f}"),
            "" if paper is None else f"{paper:.2f}", short(first.parameters), short(first.multiply_adds),
            spread([r.seconds for r in same], "{:.0f}")))  # fmt: skip
    return rows


def table_text(runs: Sequence[NetRun]) -> str:
    """The table for a terminal or a job's log."""
    return text_table("Depth study", TITLES, cells(runs), left=TITLES[:1], width=WIDTH)


def table_markdown(runs: Sequence[NetRun]) -> str:
    """The table for MLflow's description of a run."""
    return "\n".join(markdown_lines(TITLES, cells(runs)))


def text_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str],
               width: int, tight: bool = False) -> str:  # fmt: skip
    """Plain text, `width` columns at most: cells that do not fit end in an ellipsis. `left` are not numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=not tight, collapse_padding=tight)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def markdown_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The same as a table in Markdown: two lines of head, then one a row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def figure4(runs: Sequence[NetRun]) -> dict[str, bytes]:
    """The paper's Figure 4 as {"svg": ..., "png": ...}: error over epochs, training thin, validation bold; plain nets
    left, residual nets right. With several seeds the mean, and a band from the best to the worst."""
    from matplotlib.figure import Figure  # the object interface: no global state, no window

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    depths = sorted({run.depth for run in runs})
    for axes, plain, title in ((left, True, "plain nets"), (right, False, "residual nets")):
        nets = by_net(run for run in runs if run.plain is plain)
        for name, same in sorted(nets.items(), key=lambda item: item[1][0].depth):
            _draw(axes, name, same, COLOURS[depths.index(same[0].depth) % len(COLOURS)])
        _dress(axes, title)
    left.set_ylabel("error (%)")
    return save(figure)


def _draw(axes: "Axes", name: str, runs: Sequence[NetRun], colour: str) -> None:
    for field, width, label in (("train_top1", 0.9, None), ("val_top1", 2.4, name)):
        curves = [_errors(run, field) for run in runs]
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        axes.plot(epochs, [mean(v) for v in values], color=colour, linewidth=width, label=label, solid_capstyle="round")
        if len(runs) > 1:
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)


def _errors(run: NetRun, field: str) -> dict[int, float]:
    """Epoch -> error in per cent; epochs without an evaluation are left out."""
    return {int(point["epoch"]): 100.0 * (1.0 - point[field]) for point in run.curve if field in point}


def _dress(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_frame(axes)
    if axes.lines:
        axes.legend(frameon=False, title="bold: validation, thin: training", title_fontsize="small", loc="upper right")


def open_frame(axes: "Axes") -> None:
    """A faint grid in a frame that is open above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: "Figure") -> dict[str, bytes]:
    """{"svg": ..., "png": ...}; the same figure gives the same bytes: no date, a fixed salt in place of random ids."""
    from matplotlib import rc_context

    files = {}
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "skiplane"}):
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        files[kind] = buffer.getvalue()
    return files


def spread(values: Sequence[float], form: str) -> str:
    """[0.69, 0.58, 0.72] -> '0.663 (0.580..0.720)'; a single value stands alone."""
    show: Callable[[float], str] = form.format
    if len(values) == 1:
        return show(values[0])
    return f"{show(mean(values))} ({show(min(values))}..{show(max(values))})"


def short(number: float) -> str:
    """11689512 -> '11.7 M', 1814073344 -> '1.81 G'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g}"
