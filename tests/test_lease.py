"""Two drivers of one name cannot both write: one is refused, a dead one's lease is taken over, a late one is told."""

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.state import lease as leases
from orchestrator.state.driver import Driver
from orchestrator.state.lease import Fence, Tenure, lease
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError
from tests.faults import Cut, Status, always, first
from tests.servers import S3Server
from tests.test_driver import driver_of

ELSEWHERE = Driver("x", "another-host", "another-table", 1, 0)  # nobody on this host can look for it


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    return Storage(str(tmp_path / "run"))


@pytest.fixture
def s3(monkeypatch):
    with S3Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        yield server


@pytest.fixture(scope="module")
def gone():
    """A driver that was here."""
    return driver_of()


def hold(storage, said, patience_s=2.0):
    return lease(storage, "a", said.append, patience_s)


def put(storage, number, driver=ELSEWHERE, **more):
    tenure = Tenure(number, driver, **more)
    storage.write(tenure.name, tenure.to_bytes())


def until_told(ask):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ask()


# -- one after the other -----------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_while_the_first_lives(storage):
    said = []
    with hold(storage, []) as held:
        with pytest.raises(ClusterError, match=r"run 'a' is being trained by process \d+ on"), hold(storage, said):
            pass
        assert said == [
            f"run 'a' is held by process {os.getpid()} on {socket.gethostname()}; watching 2 s whether it lives"
        ]
        held.confirm()
    with hold(storage, said) as held:  # given back
        assert held.number == 2
    assert len(said) == 1  # nobody was there
    assert storage.names() == ["lease/000000002.json"]


def test_a_killed_driver_on_this_host_is_known_to_be_dead_at_once(storage):
    script = (
        "import sys, time; from orchestrator.state.lease import lease; from orchestrator.state.storage import Storage\n"
        "with lease(Storage(sys.argv[1]), 'a', print): print('held', flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, storage.place], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "held\n"
    driver.kill()
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
    said = []
    with hold(storage, said) as held:
        assert (said, held.number) == ([], 2)
    driver.communicate()


def test_a_lease_that_nobody_renews_is_taken_over_with_a_higher_number(storage):
    put(storage, 4)
    said = []
    with hold(storage, said, patience_s=0.3) as held:
        assert (len(said), held.number) == (1, 5)
        assert storage.names() == ["lease/000000005.json"]


def test_a_lease_that_is_given_back_while_it_is_watched_is_taken_at_once(storage):
    put(storage, 4)

    def released(_):
        put(storage, 4, released=True)

    with lease(storage, "a", released, patience_s=600) as held:
        assert held.number == 5


@pytest.mark.parametrize("torn", [b"", b'{"number"', b"\0" * 200, b"[]", b'{"driver": {"pid": 1}}', b"null"])
def test_a_torn_lease_is_a_number_that_nobody_renews(storage, torn):
    storage.write("lease/000000007.json", torn)
    said = []
    with hold(storage, said) as held:
        assert (said, held.number) == ([], 8)


def test_other_objects_are_no_leases(storage):
    for name in ("lease.json", "lease/9.json", "lease/000000009.json.bak", "lease/000000009.json/x"):
        storage.write(name, b"")
    with hold(storage, []) as held:
        assert held.number == 1


# -- who lost it -------------------------------------------------------------------------------------------------------


def test_a_driver_that_lost_its_lease_stops_and_leaves_it_alone(storage):
    with hold(storage, []) as held:
        held.check()
        held.begin(1).check()
        put(storage, 5)
        with pytest.raises(ClusterError, match="run 'a' was taken over by another driver; this one stops"):
            until_told(held.check)
    assert storage.names() == ["lease/000000005.json"]  # its own is removed
    assert not Tenure.of(5, storage.read("lease/000000005.json")).released  # and the other's not its to give back


def test_confirming_asks_the_storage(storage, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 600)
    with hold(storage, []) as held:
        held.confirm()
        put(storage, 2)
        held.check()  # nobody has looked yet
        with pytest.raises(ClusterError, match="taken over by another driver"):
            held.confirm()
        with pytest.raises(ClusterError, match="taken over by another driver"):
            held.check()


def test_a_fence_travels_and_tells_of_a_higher_number(storage):
    fence = pickle.loads(pickle.dumps(Fence(storage.place, 3)))  # noqa: S301
    fence.check()  # nothing is there
    for number in (2, 3):
        put(storage, number)
        fence.check()
    put(storage, 11)
    with pytest.raises(
        ClusterError,
        match=r"the run in .*/run was taken over by another driver \(lease 11, ours is 3\); this one stops",
    ):
        fence.check()


def test_workers_of_an_earlier_attempt_may_write_no_more(storage):
    """They may live: on a node that was cut off, with storage in reach."""
    with hold(storage, []) as held:
        first = held.begin(1)
        first.check()
        second = held.begin(2)
        second.check()
        with pytest.raises(
            ClusterError, match=r"the run in .* has a newer group of workers \(2, ours is 1\); this one stops"
        ):
            first.check()
        held.confirm()
        second.check()  # renewals keep it
    assert storage.read("lease/000000001.json")
    with hold(storage, []), pytest.raises(ClusterError, match="taken over by another driver"):
        second.check()


def test_a_folder_that_is_away_for_a_moment_is_no_reason_to_give_up(storage, tmp_path):
    with hold(storage, []) as held:
        (tmp_path / "run").rename(tmp_path / "away")
        (tmp_path / "run").write_bytes(b"no folder")
        with pytest.raises(ClusterError, match=r"cluster\.storage"):
            held.confirm()
        held.check()
        (tmp_path / "run").unlink()
        (tmp_path / "away").rename(tmp_path / "run")
        held.confirm()


def test_a_full_disk_does_not_end_a_lease(storage, tmp_path, monkeypatch):
    """It cannot be renewed there, nor taken by another; whose it is can still be asked."""

    def full(self, name, data):
        raise ClusterError("cluster.storage: no space left on device")

    with hold(storage, []) as held, monkeypatch.context() as patch:
        patch.setattr(Storage, "write", full)
        held.confirm()
        (tmp_path / "run" / "lease" / "000000002.json").write_bytes(Tenure(2, ELSEWHERE).to_bytes())
        with pytest.raises(ClusterError, match="taken over by another driver"):
            held.confirm()


def test_a_bucket_that_is_away_for_a_moment_is_no_reason_to_give_up(storage, s3):
    with hold(Storage(s3.url), []) as held:
        s3.fault = always(Status(503))
        seen = len(s3.log)
        while len(s3.log) < seen + 5:  # renewals that failed
            time.sleep(0.01)
        held.check()
        s3.behave()
        held.confirm()


def test_time_in_which_the_storage_did_not_answer_is_not_watched(storage, monkeypatch):
    """The other driver could not renew either; it is given all its time again."""
    put(storage, 4)
    looks, look = [], leases._newest

    def slow(where):
        looks.append(time.monotonic())
        if len(looks) == 5:
            time.sleep(1.0)  # longer than the patience
        return look(where)

    monkeypatch.setattr(leases, "_newest", slow)
    with hold(storage, [], patience_s=0.5) as held:
        assert held.number == 5
    assert looks[-1] - looks[4] >= 1.0 + 0.5


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lease_whose_answers_were_lost_is_taken_all_the_same(s3, lost):
    """The object was made, the answer cut: the second try meets its own object."""
    s3.fault = first(lost, Cut(0), "lease/000000001.json", method="PUT")
    with hold(Storage(s3.url), []) as held:
        assert held.number == 1
        assert [r.method for r in s3.log if r.path == "lease/000000001.json"][: lost + 2] == ["PUT"] * (lost + 1) + [
            "GET"
        ]


# -- at the same moment ------------------------------------------------------------------------------------------------

MANY = 4  # drivers


def contend(place, number, start, done):
    """One driver that finds the lease `number`, whose driver is dead. "" where it gets it, else what it is told.

    A holder stays until the others have been told.
    """
    start.wait()
    try:
        with lease(Storage(place), "a", lambda _: None, 600) as held:
            done.wait()
            held.confirm()
            return "" if held.number == number + 1 else f"it got {held.number}"
    except ClusterError as error:
        done.wait()
        return str(error)


def rounds_in_threads(place, rounds, dead):
    for number in range(1, 2 * rounds, 2):
        put(Storage(place), number, dead)
        start, done = threading.Barrier(MANY), threading.Barrier(MANY)
        with ThreadPoolExecutor(MANY) as pool:
            asked = [pool.submit(contend, place, number, start, done) for _ in range(MANY)]
        assert_one_got_it([future.result() for future in asked])


def assert_one_got_it(told):
    assert told.count("") == 1, told
    assert sum("is being trained by process" in words for words in told) == MANY - 1, told


def test_of_threads_that_find_a_dead_lease_exactly_one_takes_it_in_a_folder(storage, gone):
    rounds_in_threads(storage.place, 25, gone)
    assert storage.names() == ["lease/000000050.json"]


def test_of_threads_that_find_a_dead_lease_exactly_one_takes_it_in_a_bucket(storage, s3, gone):
    rounds_in_threads(s3.url, 8, gone)
    assert Storage(s3.url).names() == ["lease/000000016.json"]


def drive(place, rounds, dead, start, done, told, renew_s):
    """A process that contends again and again."""
    leases.RENEW_S = renew_s
    for number in range(1, 2 * rounds, 2):
        if start.wait() == 0:
            put(Storage(place), number, dead)
        told.put((number, contend(place, number, start, done)))


@pytest.mark.slow
def test_of_processes_that_find_a_dead_lease_exactly_one_takes_it(storage, gone):
    spawn, rounds = multiprocessing.get_context("spawn"), 50
    start, done, told = spawn.Barrier(MANY), spawn.Barrier(MANY), spawn.Queue()
    drivers = [
        spawn.Process(target=drive, args=(storage.place, rounds, gone, start, done, told, 0.05)) for _ in range(MANY)
    ]
    for driver in drivers:
        driver.start()
    found = sorted(told.get(timeout=60) for _ in range(MANY * rounds))
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0] * MANY
    for i in range(rounds):
        assert_one_got_it([words for _, words in found[MANY * i : MANY * i + MANY]])
    assert storage.names() == [f"lease/{2 * rounds:09d}.json"]


def test_who_slept_between_looking_and_taking_looks_again(storage, gone, monkeypatch):
    """Lease 1 was free when it looked; 2 came and went, and was removed by 3: making 2 again is no lease."""
    put(storage, 3, gone)
    stale, look = [Tenure(1, gone)], leases._newest
    monkeypatch.setattr(leases, "_newest", lambda where: stale.pop() if stale else look(where))
    with hold(storage, []) as held:
        assert held.number == 4
        assert storage.names() == ["lease/000000004.json"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["take", "release", "confirm", "tear", "linger"]), max_size=20))
def test_whatever_happens_numbers_rise_and_only_the_last_holder_may_write(tmp_path_factory, events):
    """Drivers that nobody sees renewing: each is taken over at once, and may wake up at any later moment."""
    storage = Storage(str(tmp_path_factory.mktemp("run")))
    drivers, last = [], 0
    with pytest.MonkeyPatch.context() as patch, ExitStack() as ends:
        patch.setattr(leases, "RENEW_S", 600)
        for event in events:
            if event == "take":
                drivers.append(ends.enter_context(lease(storage, "a", lambda _: None, patience_s=0)))
                assert drivers[-1].number == last + 1
                last += 1
            elif event == "release" and drivers:
                drivers.pop().close()
            elif event == "tear" and last:
                storage.write(f"lease/{last:09d}.json", b"{")
            elif event == "linger" and last > 1:
                put(storage, last - 1)  # of a driver that renewed in the moment it lost its lease
            elif event == "confirm":
                for driver in drivers:
                    assert may_write(driver) == (driver.number == last)
    assert storage.names()[-1:] == [f"lease/{last:09d}.json"] * (last > 0)


def may_write(driver):
    try:
        driver.confirm()
    except ClusterError:
        return False
    return True


# -- a driver that stood still -----------------------------------------------------------------------------------------

DRIVER = """
import sys
from orchestrator.state import lease as leases
from orchestrator.state.storage import Storage
leases.RENEW_S = 600  # it confirms all the time
storage = Storage(sys.argv[1])
with leases.lease(storage, 'a', print) as held:
    for count in range(10**9):
        held.confirm()
        storage.write('result.json', b'%d' % count)
        print(count, flush=True)
"""


@pytest.fixture
def stopped(storage):
    """A driver that holds the lease and writes without end, stopped."""
    line = [sys.executable, "-c", DRIVER, storage.place]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "0\n"
        driver.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, driver.pid, os.WSTOPPED)
        yield driver
        driver.kill()


def test_a_driver_that_was_stopped_and_wakes_up_does_not_write(storage, stopped):
    said = []
    with hold(storage, said, patience_s=0.5) as held:  # it is there, and does not renew
        assert len(said) == 1
        storage.write("result.json", b"ours")
        stopped.send_signal(signal.SIGCONT)
        _, err = stopped.communicate(timeout=60)
        assert "run 'a' was taken over by another driver; this one stops" in err
        assert storage.read("result.json") == b"ours"
        held.confirm()
    assert storage.names() == ["lease/000000002.json", "result.json"]


def test_a_driver_that_was_stopped_for_a_moment_goes_on(storage, stopped):
    told = f"is being trained by process {stopped.pid} on"
    with (
        pytest.raises(ClusterError, match=told),
        lease(storage, "a", lambda _: stopped.send_signal(signal.SIGCONT), patience_s=60),
    ):
        pass
