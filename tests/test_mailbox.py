"""What workers hear from the mailbox, and which groups a driver keeps: no Ray, the actor's own object and stand-ins."""

import subprocess
import sys

import pytest

from orchestrator.cluster import crews as module
from orchestrator.cluster import mailbox
from orchestrator.cluster.crews import Crews
from orchestrator.cluster.group import Size
from orchestrator.cluster.mailbox import Post

TWO = Size(2, 1, 0, 300, "eth0", ("n0", "n1"))
AT = [{"kind": "at"}]


@pytest.fixture
def now(monkeypatch):
    """The clock of the mailbox's process."""
    clock = [0.0]
    monkeypatch.setattr(mailbox.time, "monotonic", lambda: clock[0])
    return clock


def test_a_group_does_one_work_after_the_other(now):
    post = Post()
    group = post.muster()
    assert post.next(group, 0) is True  # wait
    assert post.give(group, b"a")
    number, work = post.next(group, 0)
    assert (work, post.next(group, number)) == (b"a", True)
    assert post.put(number, AT) is False
    post.ask_stop()
    assert post.put(number, AT) is True
    assert post.drain() == AT * 2
    post.put(number, AT)
    assert post.give(group, b"b")  # of another run
    assert post.drain() == []
    later, work = post.next(group, number)
    assert (work, later > number, post.put(later, [])) == (b"b", True, False)  # nobody asked this one to stop
    assert post.put(number, AT) is True
    assert post.drain() == []  # what the run before still says


def test_workers_of_a_group_that_was_given_up_hear_to_end_and_are_not_heard(now):
    post = Post()
    cut_off = post.muster()
    post.give(cut_off, b"a")
    number, _ = post.next(cut_off, 0)
    group = post.muster()
    assert post.put(number, AT) is True  # before the new group has work, too
    post.give(group, b"a")
    assert post.put(number, AT) is True
    assert (post.next(cut_off, number), post.give(cut_off, b"b"), post.rest(cut_off, 10)) == (False, False, False)
    post.dismiss(cut_off)
    assert post.next(group, number)[1] == b"a"
    assert post.drain() == []


def test_a_dismissed_group_saves_what_it_does_and_goes_home(now):
    post = Post()
    group = post.muster()
    post.give(group, b"a")
    number, _ = post.next(group, 0)
    post.dismiss(group)
    assert post.put(number, AT) is True
    assert post.drain() == AT  # what it says on the way counts
    assert (post.next(group, number), post.give(group, b"b")) == (False, False)
    assert post.next(post.muster(), 0) is True


def test_a_group_that_nobody_takes_goes_home_all_of_it(now):
    post = Post()
    group = post.muster()
    post.give(group, b"a")
    now[0] = 1000  # work takes as long as it takes
    number, _ = post.next(group, 0)
    assert post.rest(group, 10)
    now[0] += 9
    assert post.rest(group, 10)  # it is kept
    now[0] += 9
    assert post.next(group, number) is True
    now[0] += 2
    assert not post.give(group, b"b")  # no worker has heard so yet, but it is decided
    assert post.next(group, number) is False


def test_its_process_starts_without_torch():
    """It imports this module, and the driver waits for it."""
    code = "import orchestrator.cluster.mailbox, sys; print(sorted({'torch', 'ray.train'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- which groups are kept ---------------------------------------------------------------------------------------------


class Group:
    """A stand-in: alive until it is dismissed; `home`: it went home without a word."""

    def __init__(self, size, _, name):
        self.size, self.name, self.given, self.home, self.gone = size, name, [], False, False
        self.nodes = {"n0": 1, "n1": 1}

    def give(self, function, job):
        self.given.append(job)
        return not (self.home or self.gone)

    def rest(self, seconds):
        return not (self.home or self.gone)

    def dismiss(self):
        self.gone = True

    def wait(self, seconds):
        return self.gone or self.home


@pytest.fixture
def crews(monkeypatch):
    monkeypatch.setattr(module, "Group", Group)
    with Crews() as crews:
        yield crews


def taken(crews, size, job="job"):
    return crews.take(size, None, job, "a")


def test_an_idle_group_is_taken_up_and_its_cpus_are_free_meanwhile(crews):
    group = taken(crews, TWO, "a")
    assert crews.idle() == {}  # it works
    crews.give_back(group)
    assert crews.idle() == {"n0": {"CPU": 1.0, "GPU": 0.0}, "n1": {"CPU": 1.0, "GPU": 0.0}}
    assert crews.admits(TWO)
    assert taken(crews, TWO, "b") is group
    assert (group.given, crews.idle()) == (["a", "b"], {})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (TWO, True),
        (Size(2, 1, 0, 300, "eth0", ("n0", "n1", "n2")), True),  # more nodes than it is on
        (Size(2, 1, 0, 300, "eth0", ()), True),
        (Size(2, 1, 0, 300, "eth0", ("n0", "n2")), False),  # n1 is lost, or told to go
        (Size(1, 1, 0, 300, "eth0", ("n0", "n1")), False),
        (Size(2, 2, 0, 300, "eth0", ("n0", "n1")), False),
        (Size(2, 1, 1, 300, "eth0", ("n0", "n1")), False),
        (Size(2, 1, 0, 420, "eth0", ("n0", "n1")), False),
        (Size(2, 1, 0, 300, None, ("n0", "n1")), False),
        (Size(2, 1, 0, 300, "eth0", ("n0", "n1"), deterministic=False), False),
    ],
)
def test_a_group_that_does_not_fit_is_ended_before_its_cpus_are_asked_for(crews, size, expected):
    group = taken(crews, TWO)
    crews.give_back(group)
    assert crews.admits(size) is expected
    assert (group.gone, crews.idle() == {}) == (not expected, not expected)
    assert crews.admits(size)  # looked at again: nothing is in the way
    assert (taken(crews, size) is group) is expected


def test_a_group_that_went_home_is_followed_by_a_new_one(crews):
    group = taken(crews, TWO)
    crews.give_back(group)
    group.home = True
    assert crews.idle() == {}
    again = taken(crews, TWO)
    assert (again is group, again.given) == (False, ["job"])
    again.home = True  # killed, just as it ended
    crews.give_back(again)
    assert taken(crews, TWO) is not again


def test_a_single_run_keeps_no_group(monkeypatch):
    monkeypatch.setattr(module, "Group", Group)
    crews = Crews(idle_s=0)
    group = taken(crews, TWO)
    crews.give_back(group)
    assert (group.gone, crews.idle()) == (True, {})


def test_all_groups_have_ended_at_the_end(monkeypatch):
    monkeypatch.setattr(module, "Group", Group)
    with Crews() as crews:
        first = taken(crews, TWO)
        crews.end(first)
        second = taken(crews, TWO)
        crews.give_back(second)
    assert (first.gone, second.gone) == (True, True)
