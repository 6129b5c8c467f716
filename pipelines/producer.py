"""A thread that works ahead: an iterator runs in it, its items come out of a bounded queue."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class _End:
    """The last thing in a queue; carries what the iterator raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Producer(Generic[T]):
    """Runs the generator that `make` returns in a thread of its own, up to `ahead` finished items ahead.

    It is made, run and closed in that one thread, as a DALI pipeline needs it. What it raises is raised in the
    consumer, in its place of the sequence.
    """

    def __init__(self, make: Callable[[], Generator[T, None, None]], ahead: int, name: str) -> None:
        self._queue: queue.Queue[T | _End] = queue.Queue(max(1, ahead))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while not self._stop.is_set():
            item = self._queue.get()
            if isinstance(item, _End):
                self.close()
                if item.error is not None:
                    raise item.error
                return
            yield item

    def close(self) -> None:
        """Leaves no thread: waits for the item under way, drops what is finished. May be called twice."""
        self._stop.set()
        while self._thread.is_alive():
            self._drain()  # it may be waiting for room
            self._thread.join(0.02)
        self._drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, make: Callable[[], Generator[T, None, None]]) -> None:
        end = _End()
        try:
            items = make()
            try:
                for item in items:
                    self._queue.put(item)
                    if self._stop.is_set():
                        break
            finally:
                items.close()
        except BaseException as error:
            end.error = error
        self._queue.put(end)

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()  # nobody else takes from it while it is closed
