"""How a driver and its workers speak: a small actor beside the driver, which workers ask and tell.

Rank 0 moves when workers are started anew, the actor does not. It is a process of its own: this module imports neither
torch nor Ray Train, so that it is there at once.
"""

import math
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Record = dict[str, Any]  # as in context.py, which imports torch


class GroupDied(Exception):
    """A worker or its node is gone, or the group never started; trying again may help."""


class Post:
    """What the actor keeps: the work of one group of workers, their records, and when they are to go home.

    Groups and pieces of work have numbers that count up over all runs of the driver. What workers of an older group or
    of older work say is not kept, such as those of a node that was cut off, and all that they hear is to end.
    """

    def __init__(self) -> None:
        self._group = self._number = 0
        self._work: bytes | None = None
        self._records, self._stop = list[Record](), False
        self._home, self._until = True, math.inf  # whether the group was sent home; when it is

    def muster(self) -> int:
        """The number of a new group: the one that is heard from now on."""
        self._group, self._home = self._group + 1, False
        self._forget()
        return self._group

    def give(self, group: int, work: bytes) -> bool:
        """Work for a group. False where it was sent home meanwhile."""
        if self._gone(group):
            return False
        self._forget()
        self._work = work
        return True

    def next(self, group: int, after: int) -> tuple[int, bytes] | bool:
        """A worker's question: the work that comes after the one with that number; else whether to wait for some."""
        if self._gone(group):
            return False
        return (self._number, self._work) if self._work is not None and self._number > after else True

    def put(self, number: int, records: list[Record]) -> bool:
        """Records of workers; the answer is whether to stop."""
        if number != self._number:
            return True
        self._records += records
        return self._stop

    def drain(self) -> list[Record]:
        """The records since the last call."""
        records, self._records = self._records, []
        return records

    def ask_stop(self) -> None:
        """Asks the workers for a checkpoint and an end of what they do."""
        self._stop = True

    def rest(self, group: int, seconds: float) -> bool:
        """The group has nothing to do: it goes home after so long. False where it went before."""
        if self._gone(group):
            return False
        self._until = time.monotonic() + seconds
        return True

    def dismiss(self, group: int) -> None:
        """Ends what it does, and sends it home."""
        if group == self._group:
            self._stop = self._home = True

    def _gone(self, group: int) -> bool:
        """Once one of its workers was sent home, all are."""
        self._home = self._home or time.monotonic() > self._until
        return self._home or group != self._group

    def _forget(self) -> None:
        self._number += 1
        self._work, self._records, self._stop, self._until = None, [], False, math.inf


class Mailbox:
    """The driver's end; it serves all groups of a driver, one after the other. Made where it is first needed."""

    def __init__(self) -> None:
        self.actor: Any = None

    def muster(self) -> int:
        """The number of a new group."""
        try:
            if self.actor is not None:
                return int(ray.get(self.actor.muster.remote()))
        except RayError:  # lost: a new one
            pass
        self._open()
        return int(ray.get(self.actor.muster.remote()))

    def give(self, group: int, work: bytes) -> bool:
        """Forgets what is there, and hears from now on those who do this work. False where the group went home."""
        return self._ask(self.actor.give, group, work)

    def rest(self, group: int, seconds: float) -> bool:
        """Sends the group home after so long; to be said again while it is kept. False where it went before."""
        return self._ask(self.actor.rest, group, seconds)

    def drain(self) -> list[Record]:
        """What came since the last call. Raises GroupDied where the mailbox is gone."""
        try:
            return list(ray.get(self.actor.drain.remote()))
        except RayError as error:
            raise GroupDied(f"the driver's mailbox is gone ({type(error).__name__})") from error

    def ask_stop(self) -> None:
        """Asks the workers for a checkpoint and an end."""
        self._ask(self.actor.ask_stop)

    def dismiss(self, group: int) -> None:
        """Sends the group home, now."""
        self._ask(self.actor.dismiss, group)

    def close(self) -> None:
        """Ends the actor's process."""
        if self.actor is not None:
            with suppress(RayError, ValueError):
                ray.kill(self.actor)

    def _ask(self, method: Any, *values: Any) -> bool:
        """False where the mailbox is gone: the next drain says so."""
        try:
            return bool(ray.get(method.remote(*values)))
        except RayError:
            return False

    def _open(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        place = NodeAffinitySchedulingStrategy(here, soft=False)
        self.actor = ray.remote(num_cpus=0, scheduling_strategy=place)(Post).remote()
