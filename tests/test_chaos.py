"""Chaos itself: its arithmetic, and a short fixed list of faults on real hosts."""

import json
import random
from collections import Counter
from itertools import pairwise

import pytest

from tests import chaos
from tests.hosts import supported
from tests.ordeal import KINDS, Fault, Suffered
from tests.watched import Effect, Event, effect_of, event_of


def heard(*rows):
    """(second, kind, step) -> events."""
    return [Event(at, kind, *step) for at, kind, *step in rows]


# What is heard after a fault at second 10.0; step 7, done at 9.9, was the newest before.
HEARD = {
    "a worker dies, two steps are done again": (
        heard((10.8, "notice"), (24.0, "step", 6), (24.1, "step", 7), (24.2, "step", 8)),
        Effect(0.8, 14.3, 2),
    ),
    "steps from before the fault are heard after it": (
        heard((10.1, "step", 8), (10.2, "step", 9), (11.0, "notice"), (20.0, "step", 9), (20.2, "step", 10)),
        Effect(1.0, 10.0, 1),
    ),
    "nobody has to notice": (heard((30.0, "step", 8)), Effect(None, 20.1, 0)),
    "nothing is repeated": (heard((12.5, "exit"), (14.0, "anew"), (15.0, "step", 8)), Effect(2.5, 5.1, 0)),
    "twice, and nearly as far again": (
        heard((11.0, "notice"), (15.0, "step", 5), (15.1, "step", 6), (16.0, "notice"), (19.0, "step", 6),
              (19.1, "step", 7), (19.3, "step", 8)),
        Effect(1.0, 9.4, 3 + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("events", "wanted"), HEARD.values(), ids=HEARD)
def test_what_a_fault_did_is_told_from_what_was_heard(events, wanted):
    got = effect_of(Event(9.9, "step", 7), 10.0, events)
    assert (got.noticed, got.stall, got.repeated) == (
        wanted.noticed and pytest.approx(wanted.noticed),
        pytest.approx(wanted.stall),
        wanted.repeated,
    )


LINES = {
    "epoch 2/3 step 7/22  loss 0.1 top-1 9.0%": Event(1.0, "step", 29),
    "epoch 2/3 done  train loss 0.1": Event(1.0, "line"),
    "restart 1: rank 1: its process is gone": Event(1.0, "notice"),
    "error: cluster.storage: no space": Event(1.0, "notice"),
    "resize 3 -> 2 at epoch 1 step 40: 0 samples lost, 12 steps repeated": Event(1.0, "anew"),
    "resumed at epoch 1 step 40: 0 samples lost, 12 steps repeated": Event(1.0, "anew"),
}


@pytest.mark.parametrize(("line", "wanted"), LINES.items())
def test_lines_are_understood(line, wanted):
    got = event_of(1.0, line)
    assert (got.kind, got.step, got.text) == (wanted.kind, wanted.step, line)


@pytest.mark.parametrize("count", [1, 6, 7, 20])
def test_faults_are_drawn_from_the_seed_and_all_kinds_occur(count):
    drawn = chaos.draw(count, KINDS, random.Random(3))
    assert drawn == chaos.draw(count, KINDS, random.Random(3))
    assert drawn != chaos.draw(count, KINDS, random.Random(4))
    times = Counter(fault.kind for fault in drawn)
    assert sum(times.values()) == count
    assert max(times[kind] for kind in KINDS) - min(times[kind] for kind in KINDS) <= 1
    assert all(15 <= fault.gap <= 40 for fault in drawn)


def test_no_host_is_taken_away_before_the_other_one_is_back():
    for seed in range(50):
        kinds = [fault.kind for fault in chaos.draw(20, KINDS, random.Random(seed))]
        assert not any(a in chaos.AWAY and b in chaos.AWAY for a, b in pairwise(kinds)), kinds
    assert chaos.spread(["node"] * 4, random.Random(0)) == ["node"] * 4


def test_the_run_is_long_enough_for_its_faults():
    few = [Fault("worker", 20), Fault("driver", 30)]
    assert chaos.epochs_for(few) * chaos.STEPS_PER_EPOCH >= 50 + 22
    assert chaos.epochs_for([*few, Fault("node", 20)]) > chaos.epochs_for([*few, Fault("worker", 20)])


def test_unequal_results_are_named():
    same = dict.fromkeys(chaos.EQUAL, 1)
    assert chaos.differences(same, same) == []
    unequal = chaos.differences(same, same | {"data_digest": 2})
    assert unequal == ["data: 1 undisturbed, 2 here"]
    suffered = [Suffered("node", 7, "node 10.83.0.12 killed", Effect(0.5, 14.25, 9))]
    assert (
        chaos.summary(suffered, [])
        == "chaos: 1 faults, weights equal, data equal, longest stall 14.2 s, 9 steps repeated"
    )
    assert "weights equal, data differ" in chaos.summary(suffered, unequal)
    effect = "noticed after 0.5 s, training again after 14.2 s, 9 steps repeated"
    assert chaos.line_of(1, 3, suffered[0]) == f"fault 1/3 at step 7: node 10.83.0.12 killed; {effect}"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(supported()), reason=supported())
def test_a_worker_a_driver_and_a_node_die_and_the_weights_are_the_same(capsys, tmp_path):
    file = tmp_path / "chaos.json"
    code = chaos.main(["--faults", "3", "--seed", "1", "--faults-list", "worker,driver,node", "--json", str(file)])
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.splitlines()[-1].startswith("chaos: 3 faults, weights equal, data equal, longest stall ")
    told = json.loads(file.read_text())
    assert told["unequal"] == []
    said = {fault["kind"]: fault["said"] for fault in told["faults"]}
    assert set(said) == {"driver", "node", "worker"}
    assert all(": 0 samples lost, " in said[kind] for kind in ("node", "worker"))
