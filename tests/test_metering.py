"""The door to Ray's metrics: what goes wrong behind it does not reach a training."""

from orchestrator.cluster import metering


def test_what_goes_wrong_is_told_once_and_ends_nothing(capsys):
    for _ in range(3):
        metering.count({"run": "a", "rank": "0"}, {"images_total": -1.0})
        metering.show({"run": "a"}, {"no_such_gauge": 1.0})
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(line.startswith("warning: Ray's metrics do not show all of this run (") for line in told)
