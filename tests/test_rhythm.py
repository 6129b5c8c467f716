"""When the state is saved."""

import pytest

from orchestrator.rhythm import Ask, Rhythm


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_clock_asks_once_for_each_interval():
    clock = Clock()
    rhythm, asked = Rhythm(0, checkpoint_s=60, copy_s=10, clock=clock), []
    for clock.now in range(0, 70, 5):
        asked.append(int(rhythm.ask(stop=False)))
    #        0  5 10 15 20 25 30 35 40 45 50 55 60 65
    assert asked == [0, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 6, 0]


def test_nothing_is_asked_for_that_is_set_to_0():
    clock = Clock()
    rhythm = Rhythm(0, checkpoint_s=0, copy_s=0, clock=clock)
    clock.now = 1e9
    assert rhythm.ask(stop=False) == Ask.NOTHING
    assert rhythm.ask(stop=True) == rhythm.ask(stop=True) == Ask.STOP


@pytest.mark.parametrize(
    ("step", "ends_epoch", "asked", "expected"),
    [
        (6, False, Ask.NOTHING, Ask.NOTHING),
        (7, False, Ask.NOTHING, Ask.CHECKPOINT),  # by steps
        (6, True, Ask.NOTHING, Ask.CHECKPOINT),
        (6, False, Ask.COPY, Ask.COPY),
        (6, False, Ask.STOP, Ask.STOP | Ask.CHECKPOINT),
        (14, True, Ask.STOP | Ask.COPY, Ask.STOP | Ask.CHECKPOINT | Ask.COPY),
    ],
)
def test_what_is_done_after_a_step(step, ends_epoch, asked, expected):
    assert Rhythm(7, 60, 10).after(step, ends_epoch, asked) == expected


def test_a_checkpoint_of_any_cause_restarts_the_clock():
    clock = Clock()
    rhythm = Rhythm(0, checkpoint_s=60, copy_s=10, clock=clock)
    clock.now = 59
    assert rhythm.after(5, True, 0) == Ask.CHECKPOINT
    clock.now = 68
    assert rhythm.ask(stop=False) == Ask.NOTHING
    clock.now = 69
    assert rhythm.ask(stop=False) == Ask.COPY
    clock.now = 119
    assert rhythm.ask(stop=False) == Ask.COPY | Ask.CHECKPOINT
