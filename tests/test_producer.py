"""A thread that works ahead: order, errors in their place, and no thread left whatever happens."""

import threading

import pytest

from pipelines.producer import Producer


def names() -> set[str]:
    return {t.name for t in threading.enumerate()}


def counting(n, log=None, fail_at=None):
    try:
        for i in range(n):
            if i == fail_at:
                raise OSError("disk gone")
            yield i
    finally:
        if log is not None:
            log.append(threading.current_thread().name)


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_items_come_in_order_and_the_thread_ends(ahead):
    with Producer(lambda: counting(20), ahead, "p-order") as producer:
        assert list(producer) == list(range(20))
    assert "p-order" not in names()


def test_it_works_ahead_up_to_its_bound():
    made, reached = [], threading.Event()

    def items():
        for i in range(10):
            made.append(i)
            if i == 3:  # two wait in the queue, one was taken, one waits for room
                reached.set()
            yield i

    with Producer(items, 2, "p-ahead") as producer:
        assert next(iter(producer)) == 0
        assert reached.wait(10)
        assert len(made) == 4


def test_an_error_is_raised_in_its_place_and_once():
    producer = Producer(lambda: counting(5, fail_at=3), 2, "p-error")
    got = []
    with pytest.raises(OSError, match="disk gone"):
        got.extend(item for item in producer)
    assert "p-error" not in names()
    assert list(producer) == []


def test_an_error_before_the_first_item():
    def make():
        raise ValueError("no decoder")

    with pytest.raises(ValueError, match="no decoder"):
        list(Producer(make, 2, "p-make"))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_in_the_middle_ends_the_thread_and_the_generator_in_it(taken):
    log = []
    producer = Producer(lambda: counting(10**9, log), 2, "p-close")
    items = iter(producer)
    assert [next(items) for _ in range(taken)] == list(range(taken))
    producer.close()
    producer.close()
    assert "p-close" not in names()
    assert log in (["p-close"], [])  # closed in its own thread; [] where it had not begun
    assert list(items) == []


def test_a_chain_of_two_closes_from_its_end():
    def second():
        with Producer(lambda: counting(10**9), 1, "p-first") as first:
            for item in first:
                yield item * 2

    with Producer(second, 1, "p-second") as chain:
        items = iter(chain)
        assert [next(items) for _ in range(3)] == [0, 2, 4]
    assert not {"p-first", "p-second"} & names()
