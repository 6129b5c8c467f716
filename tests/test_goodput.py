"""Seconds of use: what is done again is taken back, what nobody heard of is not counted."""

import pytest

from orchestrator.goodput import Goodput

TABLE = [
    # (start, events: ("trained", step, seconds) or ("restored", step), seconds of use)
    (0, [], 0.0),
    (0, [("restored", 0)], 0.0),
    (0, [("trained", 10, 5.0), ("trained", 20, 5.0)], 10.0),
    (0, [("trained", 10, 5.0), ("trained", 20, 5.0), ("restored", 16)], 8.0),  # four of ten steps are done again
    (0, [("trained", 10, 5.0), ("trained", 20, 5.0), ("restored", 10)], 5.0),  # at a point: nothing of it is cut
    (0, [("trained", 10, 5.0), ("restored", 0), ("trained", 10, 4.0)], 4.0),  # all of it was for nothing
    (0, [("trained", 10, 5.0), ("trained", 20, 1.0), ("restored", 5), ("trained", 10, 9.0)], 11.5),  # two points fall
    (0, [("trained", 20, 10.0), ("restored", 24), ("trained", 30, 3.0)], 13.0),  # seconds of 20 to 24 are not known
    (0, [("trained", 20, 10.0), ("restored", 24), ("restored", 22)], 10.0),  # and cost nothing when they are lost
    (40, [("trained", 50, 5.0), ("restored", 45)], 2.5),  # a run that goes on
    (40, [("trained", 50, 5.0), ("restored", 30)], 0.0),  # behind its beginning: an older checkpoint was damaged
    (40, [("trained", 50, 5.0), ("restored", 30), ("trained", 50, 8.0)], 8.0),
]


@pytest.mark.parametrize(("start", "events", "seconds"), TABLE)
def test_seconds_of_use(start, events, seconds):
    goodput = Goodput(start)
    for what, *values in events:
        getattr(goodput, what)(*values)
        assert goodput.step == values[0]
    assert goodput.seconds == pytest.approx(seconds)


def test_a_share_is_of_the_seconds_since_the_beginning():
    goodput = Goodput()
    goodput.trained(10, 6.0)
    assert [goodput.share(wall) for wall in (0.0, 4.0, 8.0)] == [0.0, 1.0, 0.75]
