"""From group to group: what is said, counted, waited for and given up, with a stand-in for everything of Ray's."""

import signal
from types import SimpleNamespace

import pytest

from orchestrator import attempts as module
from orchestrator.attempts import Attempts
from orchestrator.cluster import metering
from orchestrator.cluster.group import Size
from orchestrator.cluster.mailbox import GroupDied
from orchestrator.config import RunConfig
from orchestrator.state.lease import Fence
from orchestrator.stop import Stop
from pipelines.errors import DataError, TrainingError

FINISHED = {"status": "finished", "steps": 88}
STOPPED = {"status": "stopped", "steps": 50}


class Script:
    """What one group does: for each look of the driver some records or an action, then its end (or none, it hangs)."""

    def __init__(self, *looks, end=FINISHED, taken_up=False):
        self.looks, self.end, self.taken_up = list(looks), end, taken_up
        self.stop_asked, self.dismissed, self.killed, self.waited = False, False, [], False


class Stage:
    """Plays scripts one after the other. sizes: what the cluster has room for, group by group."""

    def __init__(self, monkeypatch, *scripts, sizes=(2,) * 9, stop=None, **settings):
        self.scripts, self.sizes, self.said, self.now = list(scripts), iter(sizes), [], 0.0
        self.stop, self.jobs = stop or Stop(), []
        self.watch = SimpleNamespace(held=set(), lost=[], leaving=[], possible=0, close=lambda: None)
        self.back, self.ended, self.settled = [], [], 0
        monkeypatch.setattr(module, "Watch", self._watch)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))
        monkeypatch.setattr(module, "job_id", lambda: "01000000")
        monkeypatch.setattr(metering, "show", lambda labels, values: None)
        self.attempts = Attempts(
            RunConfig(name="a").replace(settings),
            SimpleNamespace(position=lambda step: divmod(step, 44), steps=88, steps_per_epoch=44),
            SimpleNamespace(find=lambda again: self._size()),
            SimpleNamespace(
                take=self._take,
                give_back=self.back.append,
                end=self.ended.append,
                settle=lambda: setattr(self, "settled", self.settled + 1),
            ),
            SimpleNamespace(latest=lambda: None),
            SimpleNamespace(check=lambda: None, begin=lambda attempt: Fence("place", 7, attempt)),
            SimpleNamespace(reached=0, hear=self._hear, recall=lambda curve: None, stage=self.said.append),
            SimpleNamespace(tags=lambda tags: None),
            self.said.append,
            self.stop,
            "run-id",
            "digest",
            "label",
        )

    def run(self):
        return self.attempts.run(self._size())

    def _size(self):
        return Size(next(self.sizes), 1, 0, 300)

    def _hear(self, records):
        self.attempts.ear.reached = max([self.attempts.ear.reached, *(r.get("global_step", 0) for r in records)])

    def _sleep(self, seconds):
        self.now += seconds

    # crews, the group and its watch

    def _take(self, size, function, job, name):
        assert job.fence.attempt == len(self.jobs) + 1
        self.jobs.append(job)
        self.group = Group(self, self.scripts.pop(0))
        return self.group

    def _watch(self, room, workers):
        self.watch.possible = workers
        return self.watch


class Group:
    """Plays one script."""

    def __init__(self, stage, script):
        self.stage, self.script, self.works, self.actors = stage, script, 1 + script.taken_up, []

    @property
    def done(self):
        return not self.script.looks and isinstance(self.script.end, dict)

    def wait(self, seconds):
        self.stage.now += seconds
        self.script.waited = self.script.waited or seconds > 1
        return not self.script.looks and isinstance(self.script.end, Exception)

    def hear(self):
        look = self.script.looks.pop(0) if self.script.looks else []
        records = look() or [] if callable(look) else look
        self.actors += [record["actor"] for record in records if record["kind"] == "worker"]
        return records

    def ask_stop(self):
        self.script.stop_asked = True

    def dismiss(self):
        self.script.dismissed = True

    def kill(self):
        self.script.killed += self.actors

    def outcome(self):
        if isinstance(self.script.end, Exception):
            raise self.script.end
        return self.script.end


def restored(step, source="from the checkpoint in storage"):
    return {"kind": "restored", "global_step": step, "source": source}


def at(step):
    return {"kind": "at", "global_step": step}


def worker(rank):
    return {"kind": "worker", "rank": rank, "node": f"n{rank}", "actor": f"actor {rank}"}


def test_a_group_that_finishes_is_the_only_one(monkeypatch):
    stage = Stage(monkeypatch, Script([worker(0), worker(1), restored(0, "")], [at(88)]))
    assert stage.run() == FINISHED
    assert stage.said == ["a: 2 workers, 1 CPU each, 8 lanes (100% of the workers' time used), from the start"]
    assert stage.watch.held == {"n0", "n1"}
    assert (stage.jobs[0].fence, stage.jobs[0].run_id) == (Fence("place", 7, 1), "run-id")


def test_a_death_is_followed_by_a_group_of_what_is_left(monkeypatch):
    died = GroupDied("rank 2: its process is gone")
    first = Script([restored(0, "")], [at(52)], end=died)
    second = Script([restored(40, "from memory")], end=died)
    third = Script([restored(40)])
    stage = Stage(monkeypatch, first, second, third, sizes=(3, 2, 2))
    assert stage.run() == FINISHED
    assert [line for line in stage.said if "workers" not in line] == [
        "restart 1: rank 2: its process is gone",
        "resize 3 -> 2 at epoch 1 step 40: 0 samples lost, 12 steps repeated, from memory",
        "restart 2: rank 2: its process is gone",
        "resumed at epoch 1 step 40: 0 samples lost, 0 steps repeated, from the checkpoint in storage",
    ]
    counts = stage.attempts.restarts, stage.attempts.resizes, stage.attempts.repeated
    assert counts == (2, 1, 12)


def test_a_submission_that_goes_on_says_only_what_memory_had(monkeypatch):
    stage = Stage(monkeypatch, Script([restored(50, "from memory")]))
    stage.run()
    assert stage.said[1:] == ["going on at epoch 2 step 6, from memory: newer than the checkpoint in storage"]
    assert stage.attempts.repeated == 0


def test_groups_that_die_without_progress_are_given_up_with_growing_pauses(monkeypatch):
    scripts = [Script([restored(0, "")], end=GroupDied("gone")) for _ in range(4)]
    stage = Stage(monkeypatch, *scripts, **{"cluster.max_restarts": 3})
    with pytest.raises(TrainingError, match=r"died 4 times without progress \(cluster.max_restarts = 3\).*: gone"):
        stage.run()
    pauses = [line.partition("gone")[2] for line in stage.said if line.startswith("restart")]
    assert pauses == ["", "; trying again in 1 s", "; trying again in 3 s"]


def test_progress_in_memory_is_progress(monkeypatch):
    scripts = [Script([restored(step, "from memory")], end=GroupDied("gone")) for step in range(10, 60, 10)]
    stage = Stage(monkeypatch, *scripts, Script([restored(60)]), **{"cluster.max_restarts": 1})
    assert stage.run() == FINISHED
    assert stage.attempts.restarts == 5


def test_more_room_ends_a_group_after_a_checkpoint(monkeypatch):
    stage = Stage(monkeypatch, sizes=(2, 4), **{"cluster.grow_seconds": 1, "cluster.workers": "2..4"})
    stage.scripts = [
        Script([restored(0, "")], lambda: setattr(stage.watch, "possible", 4), *[[at(50)]] * 9, end=STOPPED),
        Script([restored(50)]),
    ]
    grown = stage.scripts[0]
    assert stage.run() == FINISHED
    assert grown.stop_asked
    assert stage.said[1] == "there is room for 4 workers: saving a checkpoint, then going on with them"
    assert stage.said[3] == (
        "resize 2 -> 4 at epoch 2 step 6: 0 samples lost, 0 steps repeated, from the checkpoint in storage"
    )
    assert stage.attempts.restarts == 0


@pytest.mark.parametrize(
    ("lanes", "now", "possible", "expected"),
    [(8, 2, 3, True), (8, 2, 4, True), (8, 4, 7, False), (8, 4, 8, True), (4, 2, 3, False), (8, 3, 3, False)],
)
def test_a_group_grows_only_where_its_fullest_worker_gets_fewer_lanes(monkeypatch, lanes, now, possible, expected):
    stage = Stage(monkeypatch, **{"data.lanes": lanes, "cluster.grow_seconds": 10})
    attempts = stage.attempts
    attempts.workers = now
    attempts.restored(3, "")
    attempts.ear.reached = 5
    assert not attempts.grows(possible)  # it has just begun
    stage.now = 11
    assert attempts.grows(possible) is expected
    attempts.ear.reached = 3
    assert not attempts.grows(possible)  # it has done no step


def test_a_node_that_was_told_to_go_is_left_after_a_checkpoint(monkeypatch):
    stage = Stage(monkeypatch, sizes=(2, 1))
    leave = lambda: setattr(stage.watch, "leaving", ["10.0.0.2"])  # noqa: E731
    back = lambda: vars(stage.watch).update(leaving=[], lost=[])  # noqa: E731
    gone = lambda: setattr(stage.watch, "lost", ["10.0.0.2"])  # noqa: E731  as soon as its worker has ended
    stage.scripts = [Script([restored(0, "")], leave, gone, [at(50)], end=STOPPED), Script(back, [restored(50)])]
    told = stage.scripts[0]
    assert stage.run() == FINISHED
    assert (told.stop_asked, stage.attempts.restarts) == (True, 0)
    assert "node 10.0.0.2 was told to go: saving a checkpoint, then going on without it" in stage.said


def test_a_stop_ends_all_with_what_was_saved(monkeypatch):
    stage = Stage(monkeypatch)
    stop = lambda: stage.stop(signal.SIGTERM, None)  # noqa: E731
    stage.scripts = [Script([restored(0, "")], stop, [], end=STOPPED)]
    assert stage.run() == STOPPED
    assert stage.said[-1] == "SIGTERM: saving a checkpoint, then stopping"


def test_a_death_after_a_stop_ends_all(monkeypatch):
    stage = Stage(monkeypatch)
    stop = lambda: stage.stop(signal.SIGTERM, None)  # noqa: E731
    stage.scripts = [Script([restored(0, "")], stop, [], end=GroupDied("gone"))]
    with pytest.raises(KeyboardInterrupt):
        stage.run()


def test_a_group_that_starts_is_not_waited_for_when_all_is_to_stop(monkeypatch):
    stage = Stage(monkeypatch)
    starting = Script([worker(0)], lambda: stage.stop(signal.SIGTERM, None), *[[]] * 99, end=None)
    stage.scripts = [starting]
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    assert starting.killed == ["actor 0"]
    assert len(starting.looks) > 90


def test_a_stop_between_groups_is_heard(monkeypatch):
    stage = Stage(monkeypatch)
    stage.scripts = [Script([restored(0, "")], end=GroupDied("gone")) for _ in range(3)]
    sleep = stage._sleep

    def sleep_and_stop(seconds):
        sleep(seconds)
        if stage.attempts.restarts == 2:
            stage.stop(signal.SIGTERM, None)

    monkeypatch.setattr(module.time, "sleep", sleep_and_stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    assert len(stage.jobs) == 2


def test_an_error_of_a_worker_ends_all_once_the_group_had_time_to_end(monkeypatch):
    script = Script(
        [worker(0), restored(0, "")], [{"kind": "error", "type": "DataError", "message": "bad", "rank": 0}], end=None
    )
    stage = Stage(monkeypatch, script)
    with pytest.raises(DataError, match=r"^bad$"):
        stage.run()
    assert (script.dismissed, script.waited, script.killed) == (True, True, ["actor 0"])


def test_a_group_that_cannot_go_on_is_ended_where_ray_does_not(monkeypatch):
    lost = {"kind": "lost", "rank": 0, "cause": "lost its connection to another worker"}
    hung = Script([worker(0), restored(0, "")], [at(9)], [lost], *[[]] * 20, end=None)
    stage = Stage(monkeypatch, hung, Script([restored(0, "")]))
    assert stage.run() == FINISHED
    assert hung.killed == ["actor 0"]
    assert stage.said[1] == "restart 1: rank 0: lost its connection to another worker"


def test_a_group_whose_node_does_not_answer_is_ended(monkeypatch):
    stage = Stage(monkeypatch)
    lose = lambda: setattr(stage.watch, "lost", ["10.0.0.2"])  # noqa: E731
    back = lambda: setattr(stage.watch, "lost", [])  # noqa: E731
    stage.scripts = [Script([worker(0), worker(1)], lose, end=None), Script(back, [restored(0, "")])]
    hung = stage.scripts[0]
    assert stage.run() == FINISHED
    assert hung.killed == ["actor 0", "actor 1"]
    assert stage.said[1] == "restart 1: node 10.0.0.2 is lost or does not answer"


# -- groups that outlive a run -----------------------------------------------------------------------------------------


def test_a_group_is_given_back_where_the_run_ended_well(monkeypatch):
    stage = Stage(monkeypatch, Script([restored(0, "")], end=GroupDied("gone")), Script([restored(0, "")]))
    stage.run()
    assert (stage.back, len(stage.ended), stage.settled) == ([stage.group], 1, 0)
    stage = Stage(monkeypatch)
    stage.scripts = [Script([restored(0, "")], lambda: stage.stop.ask("the sweep"), [], end=STOPPED)]
    stage.run()
    assert (stage.back, stage.ended) == ([stage.group], [])


def test_a_group_of_another_size_than_needed_is_gone_before_the_next_one_looks_for_room(monkeypatch):
    stage = Stage(monkeypatch, Script([restored(0, "")], end=STOPPED), Script([restored(50)]), sizes=(2, 4))
    find = stage.attempts.room.find
    stage.attempts.room.find = lambda again: (stage.found.append(stage.settled), find(again))[1]
    stage.found = []
    stage.run()
    assert (len(stage.ended), stage.found) == (1, [1])


def test_a_group_after_an_error_is_not_used_again(monkeypatch):
    error = {"kind": "error", "type": "DataError", "message": "bad", "rank": 0}
    stage = Stage(monkeypatch, Script([worker(0), restored(0, "")], [error], end=None))
    with pytest.raises(DataError):
        stage.run()
    assert (stage.back, stage.ended, stage.settled) == ([], [stage.group], 1)


def test_workers_that_died_while_they_were_idle_are_no_restart(monkeypatch):
    died = GroupDied("rank 1: its process is gone")
    scripts = [Script([worker(0)], end=died, taken_up=True), Script([restored(0, "")])]
    stage = Stage(monkeypatch, *scripts, **{"cluster.max_restarts": 0})
    assert stage.run() == FINISHED
    assert (stage.attempts.restarts, stage.now < 2, len(stage.ended)) == (0, True, 1)
    assert stage.said[1] == "the workers of the run before are gone (rank 1: its process is gone): others are started"
    taken_up = Script([worker(0), restored(0, "")], [at(9)], end=died, taken_up=True)
    stage = Stage(monkeypatch, taken_up, Script([restored(0, "")]))
    stage.run()
    assert stage.attempts.restarts == 1
