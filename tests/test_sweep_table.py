"""What a sweep says: one line, its table while it runs, the ranking in text and in Markdown."""

from typing import Any

import pytest

from orchestrator.sweep import table
from orchestrator.sweep.trial import Trial
from tests.ended import NETS, trial, twelve

TOP1, LOSS = "val/top1", "val/loss"
NAMES = ["model.depth", "model.shortcut", "optim.lr"]


def head(trials: list[Trial], metric: str = TOP1, total: int = 12, left_s: float | None = None) -> str:
    return table.headline("s1", trials, metric, total=total, left_s=left_s)


def progress(trials: list[Trial], names: list[str] = NAMES, metric: str = TOP1) -> list[str]:
    return table.progress("s1", trials, names, metric, total=len(trials), left_s=None).splitlines()


def many(count: int = 200, **changes: Any) -> list[Trial]:
    """Of each ten: six ended (two of them stopped), two run, two wait."""
    states = ["finished"] * 4 + ["stopped"] * 2 + ["running"] * 2 + ["waiting"] * 2
    return [trial(i, list(NETS)[i % 4], i / count if i % 10 < 8 else None, state=states[i % 10], **changes)
            for i in range(count)]  # fmt: skip


# -- one line ----------------------------------------------------------------------------------------------------------


def test_headline_counts_what_is_over_and_names_the_best() -> None:
    states = ["stopped", "stopped", "failed", "finished", "finished", "running", "running", "waiting"]
    trials = [trial(i, "resnet-34", 0.5 + i / 100, state=state) for i, state in enumerate(states)]
    assert head(trials, left_s=200.4) == (
        "sweep s1: 5 of 12 trials over (2 stopped early, 1 failed), 2 running, best resnet-34 lr=0.1 54.0 %, 3:20 left"
    )


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([], "sweep s1: 0 of 12 trials over"),
        ([trial(1, state="running")], "sweep s1: 0 of 12 trials over, 1 running"),
        ([trial(1, top1=0.9)], "sweep s1: 1 of 12 trials over, best resnet-18 lr=0.1 90.0 %, 0:07 left"),
    ],
)
def test_headline_says_only_what_is_known(trials: list[Trial], expected: str) -> None:
    assert head(trials, left_s=7.0 if trials and trials[0].over else None) == expected


def test_headline_of_another_metric_and_of_a_finished_sweep() -> None:
    assert head([trial(1, top1=0.9)], LOSS, total=1, left_s=0.0) == (
        "sweep s1: 1 of 1 trials over, best resnet-18 lr=0.1 val loss 2.1000"
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def test_table_of_twelve_trials() -> None:
    trials = twelve()
    trials[9] = trial(10, "resnet-34", 0.61, lr=0.01, state="running", epoch=3)
    first, blank, columns, rule, *rows = progress(trials)
    assert first.startswith("sweep s1: 11 of 12 trials over (2 stopped early, 1 failed), 1 running")
    assert (blank, set(rule.strip())) == ("", {"─"})
    assert columns.split() == ["trial", "net", "lr", "epoch", "top-1", "%", "state"]
    assert [row.split() for row in rows if row.split()[0] in ("t002", "t010", "t012")] == [
        ["t002", "plain-18", "0.1", "6/6", "95.00", "finished"],
        ["t010", "resnet-34", "0.01", "3/6", "61.00", "running"],
        ["t012", "resnet-34", "1", "0/6", "failed:", "loss", "is", "nan", "at", "step", "21"],
    ]
    assert rows[2].endswith("stopped: rung of 2 epochs: 0.420 is below 0.500")


def test_many_trials_show_those_that_run_and_the_best() -> None:
    trials = many()
    lines = progress(trials)
    shown = [line.split()[0] for line in lines if line.startswith(" t") and line.split()[0] != "trial"]
    running = [t.id for t in trials if t.state == "running"]
    assert shown == sorted([*running, "t190", "t191", "t192", "t193", "t183"])
    assert lines[-1] == ("45 of 200 trials are shown; in all 80 finished, 40 stopped, 40 running, 40 waiting")


@pytest.mark.parametrize("metric", [TOP1, LOSS])
@pytest.mark.parametrize("extra", [0, 3, 12])
def test_lines_fit_and_are_plain(metric: str, extra: int) -> None:
    """However many settings vary and however long a cause is; what has no room is named."""
    wide = {f"optim.set{i}": 0.1 for i in range(extra)}
    reason = "a bad image cap\nover two lines: " + 20 * "and more of it "
    trials = [trial(i, top1=0.5, state="failed", reason=reason, title=f"resnet-18 {20 * 'x'}", config=wide)
              for i in range(1, 12)]  # fmt: skip
    names = list(wide)
    for text in ("\n".join(progress(trials, names, metric)), table.ranking(trials, names, metric)):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 110
        assert not any("\x1b" in line or "…" in line or line != line.rstrip() for line in lines)
        assert text.count("failed: a bad") == 11
        assert ("not shown for want of room" in text) is (extra == 12)
        assert all(f"set{i}" in text for i in range(extra))


def test_settings_that_the_net_does_not_tell_are_shown() -> None:
    trials = [trial(1, top1=0.9), trial(2, top1=0.8)]
    mixed = [trials[0], trial(2, top1=0.8, config=trials[1].config | {"model.shortcut": "B"}, workers="2")]
    assert progress(trials)[2].split() == ["trial", "net", "lr", "epoch", "top-1", "%", "state"]
    assert progress(mixed)[2].split() == ["trial", "net", "shortcut", "lr", "workers", "epoch", "top-1", "%", "state"]


def test_short_names_stay_apart() -> None:
    assert table.short_names(["data.size", "data.eval_size", "model.width"]) == {
        "data.size": "size", "data.eval_size": "eval_size", "model.width": "width"}  # fmt: skip
    assert table.short_names(["a.lr", "b.lr"]) == {"a.lr": "a.lr", "b.lr": "b.lr"}


def test_values_are_short_and_a_setting_that_a_trial_lacks_is_empty() -> None:
    config = {"optim.milestones": [30.0, 60.0], "optim.nesterov": True, "optim.lr": 0.0123456}
    trials = [trial(1, top1=0.9, config=config), trial(2, top1=0.8, config={"optim.lr": 1e-5})]
    rows = progress(trials, [*config, "optim.momentum"])
    assert rows[-2].split() == ["t001", "resnet-18", "30,60", "True", "0.01235", "6/6", "90.00", "finished"]
    assert rows[-1].split() == ["t002", "resnet-18", "1e-05", "6/6", "80.00", "finished"]


def test_nothing_drawn_yet_is_one_line() -> None:
    assert progress([]) == ["sweep s1: 0 of 0 trials over"]


# -- the ranking -------------------------------------------------------------------------------------------------------


def test_ranking_places_the_stopped_below_and_names_what_is_worth_its_cost() -> None:
    text = table.ranking(twelve(), NAMES, TOP1)
    rows = [line.split() for line in text.splitlines() if " t0" in line[:10]]
    assert rows[0] == ["1", "t011", "resnet-34", "0.1", "6/6", "98.30", "18.3", "M", "12", "finished"]
    assert [row[1] for row in rows] == ["t011", "t008", "t009", "t002", "t010", "t007", "t001", "t005", "t004", "t003",
                                        "t006", "t012"]  # fmt: skip
    flat = " ".join(text.split())
    assert ("Not beaten in both top-1 and multiply-adds: t008 resnet-18 lr=0.1 (97.2 %, 8.89 M), "
            "t011 resnet-34 lr=0.1 (98.3 %, 18.3 M)") in flat  # fmt: skip
    assert flat.endswith("Not beaten in both top-1 and seconds: t011 resnet-34 lr=0.1 (98.3 %, 12 s)")


def test_ranking_by_loss_shows_the_accuracy_besides() -> None:
    text = table.ranking([trial(1, top1=0.9)], NAMES, LOSS)
    assert "val loss  top-1 %" in text
    assert "2.1000    90.00" in text


def test_ranking_of_nothing_but_failures() -> None:
    text = table.ranking([trial(1, state="failed", reason="no memory")], NAMES, TOP1)
    assert "failed: no memory" in text
    assert "Not beaten" not in text


def test_markdown_has_the_same_rows() -> None:
    lines = table.ranking_markdown(twelve(), NAMES, TOP1, 8000).splitlines()
    assert lines[:3] == [
        "| place | trial | net | lr | epochs | top-1 % | mult-adds | seconds | state |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | t011 | resnet-34 | 0.1 | 6/6 | 98.30 | 18.3 M | 12 | finished |",
    ]
    assert len([line for line in lines if line.startswith("| ")]) == 14
    assert lines[-1].startswith("Not beaten in both top-1 and seconds")


@pytest.mark.parametrize("room", [8000, 3000, 500])
def test_markdown_keeps_the_best_and_counts_the_rest(room: int) -> None:
    text = table.ranking_markdown(many(), NAMES, TOP1, room)
    kept = len([line for line in text.splitlines() if line.startswith("| ")]) - 2
    assert len(text) <= room
    assert f"... and {200 - kept} more" in text
    if room > 500:
        assert "Not beaten in both top-1 and seconds" in text
        assert len(text) > room - 100  # as many rows as fit


def test_markdown_of_a_cause_with_a_bar_stays_a_table() -> None:
    text = table.ranking_markdown([trial(1, state="failed", reason="a | b\nc")], NAMES, TOP1, 8000)
    assert text.splitlines()[2].count("|") == text.splitlines()[0].count("|")
