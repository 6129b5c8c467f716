"""The arithmetic of the start-up benchmark: nothing between the submission and the end is lost or counted twice."""

from types import SimpleNamespace

import pytest

from benchmarks import startup
from benchmarks.startup import FIRST_STEP, MOMENTS, SUBMITTED, first_step, since_start, stretches


def test_stretches_add_up_to_the_whole():
    moments = {name: 1000.0 + place**2 for place, name in reversed(list(enumerate(MOMENTS)))}
    took = stretches(moments)
    assert list(took) == list(MOMENTS)[1:]
    assert list(took.values()) == [2 * place + 1 for place in range(len(MOMENTS) - 1)]
    assert sum(took.values()) == since_start(moments)["job ended"] == (len(MOMENTS) - 1) ** 2
    assert since_start(moments)[SUBMITTED] == 0


def test_a_moment_that_nobody_saw_is_an_error():
    with pytest.raises(KeyError, match="data ready"):
        stretches(dict.fromkeys(set(MOMENTS) - {"data ready"}, 0.0))


def test_the_first_step_is_cut_at_its_wait_for_data():
    def points(*values):
        return [SimpleNamespace(step=step, timestamp=1_000_000 + 500 * step, value=value) for step, value in values]

    history = {"perf/step_s": points((2, 0.1), (1, 4.0)), "perf/data_wait": points((2, 0.0), (1, 0.75))}
    assert first_step(history) == {"net built": 996.5, "data ready": 999.5, FIRST_STEP: 1000.5}


def test_numbers_that_make_no_sense_are_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        startup.main(["--rounds", "0"])
    assert refused.value.code == 2
    assert "--rounds is 0; at least 1 is needed" in capsys.readouterr().err
