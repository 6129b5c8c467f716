"""A real training whose server is killed and hangs, whose sender and driver are killed: the curves are whole."""

from pathlib import Path

import pytest

from tests import outage, undisturbed


@pytest.mark.slow
@pytest.mark.long
def test_a_training_goes_on_and_its_curves_are_whole(home: Path, tmp_path: Path) -> None:
    with outage.running("sqlite", False, tmp_path) as server:
        told = undisturbed.story(server, home, tmp_path, seconds=12.0)
    assert "journal and server agree" in told.verified
    assert told.tracking["records"] == told.tracking["shipped"] > 100
    assert told.tracking["refused"] == 0
    assert told.longest_gap == 22  # log_steps: none was lost, also where the driver was killed
    assert all(count > 5 for _, count in told.steps.values())
