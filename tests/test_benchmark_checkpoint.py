"""The checkpoint benchmark's arithmetic, and a run of it."""

import json

import pytest

from benchmarks import checkpoint
from benchmarks.checkpoint import Turn, row


def test_a_save_costs_its_call_and_what_the_steps_took_longer():
    turn = Turn(call=0.02, call_cpu=0.01, without=[0.1, 0.1, 0.1], with_it=[0.15, 0.12, 0.1], whole=0.4)
    assert turn.cost == pytest.approx(0.09)
    found = row([turn, Turn(0.04, 0.04, [0.1], [0.1], 0.2), Turn(0.03, 0.03, [0.2], [0.1], 0.3)])
    assert found["call_ms"] == pytest.approx(30)
    assert found["call_cpu_ms"] == pytest.approx(30)
    assert found["cost_ms"] == pytest.approx(40)  # of 90, 40 and -70
    assert found["steps_ratio"] == pytest.approx(1.0)  # of 0.37 / 0.3, 1 and 0.5
    assert (found["whole_ms_low"], found["whole_ms_high"]) == (pytest.approx(200), pytest.approx(400))


@pytest.mark.slow
def test_it_measures_every_way_and_every_sum(tmp_path, capsys):
    file = tmp_path / "checkpoint.json"
    flags = ["--width", "4", "--rounds", "1", "--steps", "2", "--sum_rounds", "1", "--folder", str(tmp_path)]
    assert checkpoint.main(["--quick", *flags, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    names = ["skiplane", "skiplane, into memory too", "torch.save in the step", "torch's async_save"]
    assert list(written["ways"]) == names
    assert all(found["call_ms"] > 0 and found["whole_ms"] > 0 for found in written["ways"].values())
    assert list(written["sums"]) == ["ordered", "exact"]
    assert all(cost["wall_ratio"] > 0 for cost in written["sums"].values())
    assert written["state_bytes"] > 1e6
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # no checkpoint is left
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*names, "ordered", "exact"])


@pytest.mark.parametrize(("flag", "least"), [("rounds", 1), ("steps", 1), ("sum_rounds", 0)])
def test_numbers_that_make_no_sense_are_refused(capsys, flag, least):
    with pytest.raises(SystemExit) as refused:
        checkpoint.main([f"--{flag}", "-1"])
    assert refused.value.code == 2
    assert f"--{flag} is -1; at least {least} is needed" in capsys.readouterr().err
