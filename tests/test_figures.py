"""Tables and the figure of a study."""

import re

import pytest

from orchestrator import figures
from orchestrator.verdict import Row


def row(name: str, seed: int = 0, loss: float = 0.04) -> Row:
    kind, depth = name.rsplit("-", 1)
    curve = [{"epoch": e, "train_top1": 1 - loss - 0.5 / e, "val_top1": 1 - loss - 0.4 / e} for e in range(1, 7)]
    del curve[2]["val_top1"]  # an epoch that was not evaluated
    shortcut = "none" if kind == "plain" else "A"
    return Row(
        name, seed, int(depth), shortcut, loss, 100 * loss, 6, 12.4, 690_266, 8_893_440, "w", "d", None, 0.5, curve
    )


FOUR = [row("plain-18"), row("plain-34", loss=0.4), row("resnet-18"), row("resnet-34")]


def test_cells_stand_beside_the_paper() -> None:
    assert figures.cells(FOUR) == [
        ("plain-18", "0.040", "4.0", "27.94", "690 k", "8.89 M", "12"),
        ("plain-34", "0.400", "40.0", "28.54", "690 k", "8.89 M", "12"),
        ("resnet-18", "0.040", "4.0", "27.88", "690 k", "8.89 M", "12"),
        ("resnet-34", "0.040", "4.0", "25.03", "690 k", "8.89 M", "12"),
    ]


def test_several_seeds_are_one_row_with_their_range() -> None:
    rows = [row("plain-20", seed, loss) for seed, loss in enumerate((0.1, 0.2, 0.6))]
    assert figures.cells(rows) == [
        ("plain-20", "0.300 (0.100..0.600)", "30.0 (10.0..60.0)", "", "690 k", "8.89 M", "12 (12..12)")
    ]


def test_table_fits_a_log() -> None:
    lines = figures.table_text([row(net.name, seed, net.train_loss) for net in FOUR for seed in range(3)]).splitlines()
    assert len(lines) == 1 + 1 + 2 + 4  # title, blank, head with its rule, nets
    assert max(map(len, lines)) < 130
    assert not any("…" in line for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_markdown_table() -> None:
    lines = figures.table_markdown(FOUR).splitlines()
    assert lines[0].startswith("| net | training loss | val error % |")
    assert lines[1] == "| --- | --- | --- | --- | --- | --- | --- |"
    assert lines[3].startswith("| plain-34 | 0.400 | 40.0 | 28.54 |")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (690_266, "690 k"), (11_689_512, "11.7 M"), (1_814_073_344, "1.81 G")],
)
def test_short_numbers(number: int, text: str) -> None:
    assert figures.short(number) == text


def test_figure_draws_thin_training_and_bold_validation_curves() -> None:
    """Two lines a net; the widths are Figure 4's meaning."""
    svg = figures.figure4(FOUR)["svg"].decode()
    curves = re.findall(r'<g id="line2d_\d+">\s*<path d="([^"]+)" clip-path[^>]*style="([^"]*)"', svg)
    widths = [re.search(r"stroke-width: ([\d.]+)", style) for _, style in curves if "stroke: #" in style]
    found = [width[1] for width in widths if width]
    assert (found.count("0.9"), found.count("2.4")) == (4, 4)
    points = {path.count("L") + path.count("M") for path, style in curves if "stroke-width: 2.4" in style}
    assert points == {5}  # six epochs, one of them not evaluated
    assert svg.index("plain nets") < svg.index("residual nets")


def test_figure_is_the_same_for_the_same_runs() -> None:
    first, second = figures.figure4(FOUR), figures.figure4(FOUR)
    assert first == second
    assert first["png"].startswith(b"\x89PNG")


def test_figure_of_one_kind_of_net_and_several_seeds() -> None:
    svg = figures.figure4([row("plain-18", seed, 0.1 * seed) for seed in range(3)])["svg"].decode()
    assert svg.count("FillBetweenPolyCollection") or svg.count("PolyCollection")
