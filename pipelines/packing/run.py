"""Doing independent tasks. Here: one after the other in this process; processes.py and the door to Ray do many at once.

All are alike: tasks are taken when there is room for them, and what was made of each comes back, in any order.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Tell = Callable[[int], None]  # so much more of a task is done
Work = Callable[[T, Tell, int], R]  # task, progress, threads that it may use -> what is made of it


class Run(Protocol):
    """Does tasks; `tell(task, more)` hears of their progress. Raises what the work raises."""

    def __call__(
        self, work: Work[T, R], tasks: Iterable[T], tell: Callable[[T, int], None]
    ) -> Iterator[tuple[T, R]]: ...


@dataclass(frozen=True)
class Here:
    """In this process, each with so many threads."""

    threads: int

    def __call__(self, work: Work[T, R], tasks: Iterable[T], tell: Callable[[T, int], None]) -> Iterator[tuple[T, R]]:
        """See Run."""
        for task in tasks:
            yield task, work(task, lambda more, task=task: tell(task, more), self.threads)  # type: ignore[misc]
