"""The step's benchmark runs and writes what it prints."""

import json

import pytest

from benchmarks import step


@pytest.mark.slow
def test_it_measures_every_variant(tmp_path, capsys):
    file = tmp_path / "step.json"
    assert (
        step.main(["--quick", "--width", "4", "--size", "8", "--rounds", "1", "--steps", "1", "--json", str(file)]) == 0
    )
    written = json.loads(file.read_text())
    assert list(written["variants"]) == ["plain", *step.VARIANTS]
    assert written["variants"]["plain"]["wall_ratio"] == 1.0
    assert all(row["wall_ms"] > 0 and row["cpu_ms"] > 0 for row in written["variants"].values())
    assert written["setting"] | {"width": 4, "size": 8, "rounds": 1, "steps": 1} == written["setting"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in step.VARIANTS)


def test_a_batch_that_four_lanes_do_not_divide_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        step.main(["--batch", "30"])
    assert refused.value.code == 2
    assert "--batch is 30; it must be a multiple of 4" in capsys.readouterr().err
