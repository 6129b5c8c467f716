"""Slots on Ray Tune: one process for trial after trial, and what is heard of each; with trials that do not train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from pathlib import Path
from orchestrator.cluster.environment import prepare
prepare(Path(sys.argv[1]))
from orchestrator.cluster.session import session
from orchestrator.cluster.trials import Assignment, Trials, check_room
from pipelines.errors import ClusterError
from tests.trials_stub import train

class Director:
    def __init__(self, trials, given, at_once, stop=(), fails=""):
        self.trials, self.given, self.at_once, self.stop, self.fails = trials, list(given), at_once, stop, fails
        self.active, self.told = set(), []
    def next(self):
        if not self.given or len(self.active) >= self.at_once:
            return None
        what = self.given.pop(0)
        self.active.add(what)
        return Assignment(what, what)
    def over(self):
        return not self.given and not self.active
    def abandons(self):
        return False
    def heard(self, id, news):
        self.told += [[id, record["pid"]] for record in news if record["kind"] == "began"]
        if id == self.fails:
            raise ClusterError("the journal is full")
        if id in self.stop:
            self.trials.stop(id, "asha")
    def ended(self, id, outcome):
        self.active.discard(id)
        self.told.append([id, outcome])
    def died(self, id, why):
        self.active.discard(id)
        self.told.append([id, "died", why])

found = {}
with session(2):
    found["room"] = check_room()
    trials = Trials(train)
    for name, director in {
        "in turn": Director(trials, ["a", "b", "raises", "c"], 1),
        "stopped": Director(trials, ["talks"], 1, stop=("talks",)),
        "dies": Director(trials, ["dies", "d"], 1),
        "fails": Director(trials, ["e"], 1, fails="e"),
    }.items():
        try:
            trials.run(director)
        except ClusterError as error:
            director.told.append(["raised", str(error)])
        found[name] = director.told
    trials.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    import json

    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    line = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("home"))]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    *noise, last = done.stdout.splitlines()
    assert noise == []  # Tune's own tables are in nobody's interest
    return json.loads(last)


def test_one_process_trains_one_trial_after_the_other(found):
    told = found["in turn"]
    pids = {entry[1] for entry in told if isinstance(entry[1], int)}
    assert len(pids) == 1
    ends = {entry[0]: entry[1] for entry in told if isinstance(entry[1], dict)}
    assert list(ends) == ["a", "b", "raises", "c"]
    assert {ends[id]["state"] for id in "abc"} == {"finished"}
    assert ends["raises"]["state"] == "failed"
    assert ends["raises"]["reason"].startswith("ValueError: boo (")
    assert ends["raises"]["reason"].endswith("please report it")


def test_a_trial_that_talks_without_a_pause_hears_that_it_should_stop(found):
    assert found["stopped"][-1] == ["talks", {"state": "stopped", "reason": "asha"}]


def test_a_slot_that_dies_is_told_and_the_next_trial_has_another(found):
    assert next(entry for entry in found["dies"] if entry[1] == "died")[:2] == ["dies", "died"]
    pids = [entry[1] for entry in found["dies"] if isinstance(entry[1], int)]
    assert found["dies"][-1] == ["d", {"state": "finished", "reason": None}]
    assert len(pids) == len(set(pids))


def test_what_the_director_raises_comes_out_as_it_is(found):
    assert found["fails"][-1] == ["raised", "the journal is full"]


def test_a_cluster_has_room_for_slots(found):
    assert found["room"] >= 1
