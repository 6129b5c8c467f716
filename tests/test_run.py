"""Tasks in this process and in several: each is done once, taken when there is room, and errors are the work's."""

import os

import pytest

from pipelines.errors import ClusterError, DataError
from pipelines.packing.processes import Processes
from pipelines.packing.run import Here


def square(task, tell, threads):
    tell(task)
    tell(1)
    return task * task, os.getpid(), threads


def fail(task, tell, threads):
    raise DataError(f"{task} is bad") if task == 3 else ZeroDivisionError("a fault of the program")


def leave(task, tell, threads):
    os._exit(7)


@pytest.mark.parametrize("run", [Here(5), Processes(1), Processes(3), Processes(40)])
def test_all_tasks_are_done_once_and_heard_of(run):
    heard = {}
    made = list(run(square, iter(range(20)), lambda task, more: heard.update({task: heard.get(task, 0) + more})))
    assert sorted((task, result[0]) for task, result in made) == [(i, i * i) for i in range(20)]
    assert heard == {i: i + 1 for i in range(20)}
    processes = {pid for _, (_, pid, _) in made}
    assert (os.getpid() in processes) == isinstance(run, Here)
    assert len(processes) <= min(20, getattr(run, "count", 1))
    assert {threads for _, (_, _, threads) in made} == {5 if isinstance(run, Here) else 1}


def test_no_task_is_no_process():
    assert list(Processes(3)(square, [], print)) == []


@pytest.mark.parametrize(("run", "ahead"), [(Here(1), 0), (Processes(2), 2)])
def test_tasks_are_taken_when_there_is_room(run, ahead):
    """A million of them would not fit."""
    taken = []
    tasks = (taken.append(i) or i for i in range(10**9))
    made = run(square, tasks, lambda *_: None)
    for count in range(1, 8):
        next(made)
        assert len(taken) <= count + ahead
    made.close()


@pytest.mark.parametrize("run", [Here(1), Processes(2)])
def test_errors_are_those_of_the_work(run):
    with pytest.raises(DataError, match="3 is bad"):
        list(run(fail, [3], print))
    with pytest.raises(ZeroDivisionError, match="a fault of the program") as caught:
        list(run(fail, [4], print))
    assert isinstance(run, Here) or "in fail" in caught.value.__notes__[0]  # where it was, in the other process


def test_a_process_that_leaves_is_told():
    with pytest.raises(ClusterError, match="a packing process ended with exit code 7 while it made 5; give the same"):
        list(Processes(2)(leave, [5], print))
