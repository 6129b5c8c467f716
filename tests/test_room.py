"""Where a group goes: the nodes as they are now, waits that are said, a node that cannot take part passed over."""

from types import SimpleNamespace

import pytest

from orchestrator.cluster import room as rooms
from orchestrator.cluster.crews import Crews
from orchestrator.cluster.room import Room
from orchestrator.cluster.session import Node
from orchestrator.cluster.watch import LOST_LOOKS, Watch
from orchestrator.config import RunConfig
from pipelines.errors import ClusterError


class Cluster:
    """A stand-in for what Ray knows. used: CPUs that others use, by node."""

    def __init__(self, monkeypatch, cpus):
        self.nodes = {f"n{i}": Node(f"n{i}", f"10.0.0.{i}", float(count), 0.0, 1) for i, count in enumerate(cpus)}
        self.silent, self.leaving, self.faulty, self.asked = set(), set(), set(), []
        self.used, self.now, self.later = {}, 0.0, []
        for name, value in {
            "nodes": lambda: list(self.nodes.values()),
            "reachable": lambda found: [node for node in found if node.id not in self.silent],
            "draining": lambda: set(self.leaving),
            "free": lambda: {id: {"CPU": n.cpus - self.used.get(id, 0)} for id, n in self.nodes.items()},
        }.items():
            monkeypatch.setattr(rooms.session, name, value)
        monkeypatch.setattr(rooms, "preflight", self._preflight)
        monkeypatch.setattr(rooms, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))

    def _preflight(self, nodes, *_, space):
        self.asked += [node.id for node in nodes]
        if bad := [node.address for node in nodes if node.id in self.faulty]:
            raise ClusterError(f"cluster.storage cannot be used on {bad[0]}")
        return [SimpleNamespace(address=node.address, interface="eth0") for node in nodes]

    def _sleep(self, seconds):
        self.now += seconds
        for at, change in list(self.later):
            if self.now >= at:
                self.later.remove((at, change))
                change()


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch, (2, 2, 2))


def room_for(workers, said, stopped=bool, cpus=1, crews=None):
    settings = {"cluster.workers": workers, "cluster.wait_seconds": 60, "cluster.cpus_per_worker": cpus}
    config = RunConfig().replace(settings)
    return Room(config, SimpleNamespace(streamed=False), None, crews or Crews(), said.append, stopped)


@pytest.mark.parametrize(
    ("workers", "expected"),
    [("1", 1), ("4", 4), ("2..8", 6), ("1..3", 3), ("6", 6)],
)
def test_as_many_workers_as_fit(cluster, workers, expected):
    size = room_for(workers, said := []).find()
    assert (size.workers, size.nodes, size.interface, said) == (expected, ("n0", "n1", "n2"), "eth0", [])


def test_a_node_that_does_not_answer_or_was_told_to_go_gets_no_workers(cluster):
    cluster.silent, cluster.leaving = {"n0"}, {"n2"}
    size = room_for("1..6", []).find(again=True)
    assert (size.workers, size.nodes) == (2, ("n1",))


def test_each_node_is_asked_once(cluster):
    room = room_for("1..8", [])
    room.find()
    cluster.nodes["n3"] = Node("n3", "10.0.0.3", 2.0, 0.0, 1)
    assert room.find(again=True).workers == 8
    assert cluster.asked == ["n0", "n1", "n2", "n3"]


def test_at_the_start_a_node_that_cannot_take_part_is_an_error_and_later_it_is_passed_over(cluster):
    cluster.faulty = {"n2"}
    with pytest.raises(ClusterError, match=r"cannot be used on 10\.0\.0\.2"):
        room_for("2..6", []).find()
    size = room_for("2..6", said := []).find(again=True)
    assert (size.workers, size.nodes) == (4, ("n0", "n1"))
    assert said == ["node 10.0.0.2 gets no workers: cluster.storage cannot be used on 10.0.0.2"]


def test_a_cluster_that_is_too_small_is_refused_at_the_start_and_waited_for_later(cluster):
    with pytest.raises(ClusterError, match="asks for 8 workers of 1 CPU each; the cluster has room for 6"):
        room_for("8", []).find()
    assert cluster.now == 0
    cluster.later = [(20, lambda: cluster.nodes.update(n3=Node("n3", "10.0.0.3", 2.0, 0.0, 1)))]
    assert room_for("8", said := []).find(again=True).workers == 8
    assert said == ["waiting for nodes for 8 workers: those that are left have room for 6"]


def test_nodes_that_do_not_come_are_an_error(cluster):
    sentence = (
        r"the run needs nodes for 8 workers; those that are left have room for 6, after cluster.wait_seconds = 60"
    )
    with pytest.raises(ClusterError, match=sentence):
        room_for("8", []).find(again=True)


def test_busy_cpus_are_waited_for_and_a_range_takes_what_is_free(cluster):
    cluster.used = {"n0": 2, "n1": 1}
    cluster.later = [(20, lambda: cluster.used.clear())]
    assert room_for("6", said := []).find().workers == 6
    assert said == ["waiting for 6 CPUs: 3 CPUs are free and the rest is in use"]
    cluster.used, began = {"n0": 2, "n1": 1}, cluster.now
    assert room_for("2..6", []).find().workers == 3
    assert rooms.SETTLE_S < cluster.now - began < rooms.SETTLE_S + 1
    with pytest.raises(ClusterError, match="the run needs 6 CPUs; 3 CPUs are free and the rest is in use, after"):
        room_for("4..6", []).find()


def test_what_is_free_in_pieces_or_where_no_worker_may_go_is_no_room(cluster):
    room = room_for("1..6", [], cpus=2)
    cluster.used = {"n1": 1}
    assert room.find().workers == 2
    cluster.faulty, cluster.used = {"n3"}, {"n0": 1}
    cluster.nodes["n3"] = Node("n3", "10.0.0.3", 8.0, 0.0, 1)
    assert room.find(again=True).workers == 2


def test_whoever_is_asked_to_stop_does_not_wait(cluster):
    cluster.used = {"n0": 2, "n1": 2, "n2": 2}
    with pytest.raises(KeyboardInterrupt):
        room_for("2", [], stopped=lambda: True).find()


class Idle:
    """Crews with an idle group of one CPU each on n0, n1; it goes home when another size is asked for."""

    def __init__(self, cluster, workers):
        self.cluster, self.workers, self.asked = cluster, workers, []
        cluster.used = {"n0": 1, "n1": 1}

    def idle(self):
        return {"n0": {"CPU": 1.0, "GPU": 0.0}, "n1": {"CPU": 1.0, "GPU": 0.0}} if self.workers else {}

    def admits(self, size):
        self.asked.append(size.workers)
        if fits := size.workers == self.workers or not self.workers:
            return fits
        self.workers = 0
        self.cluster.later = [(self.cluster.now + 2, self.cluster.used.clear)]
        return False


def test_what_this_drivers_idle_group_holds_is_free(cluster):
    crews = Idle(cluster, 6)
    assert room_for("6", said := [], crews=crews).find().workers == 6
    assert (said, cluster.now, crews.asked) == ([], 0, [6])


def test_an_idle_group_of_another_size_is_ended_and_its_cpus_are_waited_for(cluster):
    crews = Idle(cluster, 2)
    assert room_for("6", said := [], crews=crews).find().workers == 6
    assert said == ["waiting for 6 CPUs: 4 CPUs are free and the rest is in use"]
    assert (crews.asked, cluster.now > 2) == ([6, 6], True)


# -- while a group trains ----------------------------------------------------------------------------------------------


@pytest.fixture
def watch(cluster, monkeypatch):
    """A watch over two workers on n0 and n1; `_look` is its tick, and its own thread never makes one."""
    monkeypatch.setattr(Watch, "_run", lambda self, look: None)
    cluster.nodes.pop("n2")
    room = room_for("1..6", [])
    room.find()
    watch = Watch(room, 4)
    watch.held, cluster.used = {"n0", "n1"}, {"n0": 2, "n1": 2}
    yield watch
    watch.close()


def looks(watch, times):
    for _ in range(times):
        watch._look()
        watch._look_for_more()
    return watch.lost, watch.leaving, watch.possible


def test_a_quiet_cluster_is_left_alone(watch):
    assert looks(watch, 10) == ([], [], 4)


def test_a_node_that_is_gone_is_lost_at_once_and_one_that_is_silent_after_a_while(watch, cluster):
    looks(watch, 1)
    cluster.silent = {"n1"}
    assert looks(watch, LOST_LOOKS - 1)[0] == []
    assert looks(watch, 1)[0] == ["10.0.0.1"]
    cluster.silent = set()
    assert looks(watch, 1)[0] == []  # it was not gone
    del cluster.nodes["n0"]
    assert looks(watch, 1)[0] == ["10.0.0.0"]


def test_a_node_that_was_told_to_go_matters_where_it_has_workers(watch, cluster):
    cluster.nodes["n7"] = Node("n7", "10.0.0.7", 2.0, 0.0, 1)
    cluster.leaving = {"n7"}
    assert looks(watch, 1)[1] == []
    cluster.leaving = {"n7", "n1"}
    assert looks(watch, 1)[1] == ["10.0.0.1"]


def test_more_room_counts_when_it_lasts_is_free_and_can_take_part(watch, cluster, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("orchestrator.cluster.watch.time", SimpleNamespace(monotonic=lambda: now[0]))
    cluster.nodes["n2"], cluster.used["n2"] = Node("n2", "10.0.0.2", 2.0, 0.0, 1), 2
    assert looks(watch, 3)[2] == 4  # its CPUs are another run's
    cluster.used["n2"] = 1
    assert looks(watch, 1)[2] == 4
    now[0] = 10
    assert looks(watch, 1)[2] == 5
    assert cluster.asked == ["n0", "n1", "n2"]  # before the group is ended for it
    cluster.used["n2"] = 2
    assert looks(watch, 1)[2] == 4


def test_a_new_node_that_cannot_take_part_is_no_room(watch, cluster, monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("orchestrator.cluster.watch.time", SimpleNamespace(monotonic=lambda: float(next(now))))
    cluster.nodes["n2"] = Node("n2", "10.0.0.2", 2.0, 0.0, 1)
    cluster.faulty = {"n2"}
    assert looks(watch, 5)[2] == 4
    assert cluster.asked.count("n2") == 1
    cluster.now, cluster.faulty = cluster.now + rooms.REFUSED_S + 1, set()  # what was wrong has passed
    assert looks(watch, 1)[2] == 6
