"""The arithmetic of benchmarks.recovery, and a quick round of it on real hosts."""

import json

import pytest

from benchmarks import recovery
from benchmarks.recovered import recovered, useful
from tests.hosts import supported
from tests.watched import Event, event_of

BEFORE = Event(99.9, "step", 40)


def heard(*lines):
    """(seconds, a line's text, or a global step of an epoch of 22) -> events."""
    return [event_of(at, line) if isinstance(line, str) else Event(at, "step", line) for at, line in lines]


LINES = (
    (100.1, 41),  # done before the fault, heard after it
    (100.6, "restart 1: rank 1: its process is gone"),
    (101.0, "a: 2 workers, 1 CPU each, 4 lanes (100% of the workers' time used), from epoch 2 step 16"),
    (108.0, "resumed at epoch 2 step 16: 0 samples lost, 3 steps repeated, from memory"),
    (110.0, 39),
    (110.2, 40),
    (110.4, 41),
    (110.6, 42),
)


def test_where_the_time_goes():
    after = recovered(BEFORE, 100.0, heard(*LINES))
    assert (after.stall_s, after.repeated) == (pytest.approx(10.6), 3)
    assert list(after.stretches.values()) == pytest.approx([0.6, 0.4, 7.0, 2.0, 0.6])
    assert sum(after.stretches.values()) == pytest.approx(after.stall_s)


@pytest.mark.parametrize("count", range(len(LINES)))
def test_before_a_new_step_nothing_has_recovered(count):
    assert recovered(BEFORE, 100.0, heard(*LINES[:count])) is None


def test_what_a_run_does_not_tell_goes_into_the_next_stretch():
    after = recovered(BEFORE, 100.0, heard((108.0, "resumed at step 38 after 1.0 s"), (110.0, 39), (110.6, 41)))
    assert list(after.stretches) == ["until it is restored", "until the first step", "until a new step"]
    assert after.repeated == 2


def test_what_share_of_time_is_useful():
    """Ten steps of a second, ten seconds of nothing, three repeated ones, ten steps of two seconds."""
    steps = [(float(i), i) for i in range(1, 11)]
    steps += [(20.0 + i, 7 + i) for i in (1, 2, 3)]
    steps += [(23.0 + 2 * i, 10 + i) for i in range(1, 11)]
    share = useful(heard(*steps), began=0.0, step_s=1.0)
    assert share["seconds"] == 42.0
    assert share["training"] == pytest.approx((9 + 18) / 42)
    assert share["full_speed"] == pytest.approx(19 / 42)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(bool(supported()), reason=supported() or "hosts can be made")
def test_a_quick_round(tmp_path, capsys):
    assert recovery.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    [row] = json.loads((tmp_path / "figures.json").read_text())["faults"]
    assert (row["way"], row["fault"]) == ("skiplane", "worker")
    assert len(row["stretches"]) == 5
    assert "until noticed" in capsys.readouterr().out
