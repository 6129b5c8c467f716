"""Groups that outlive a run: the next one of this driver takes up the workers of the one before, where they fit.

Starting a group takes ten seconds and more, giving it work a fraction of one. A run that ended well gives its group
back; one that nobody takes ends by itself.
"""

import time
from dataclasses import replace
from typing import Any, Self

from orchestrator.cluster.group import Group, Size
from orchestrator.cluster.mailbox import Mailbox
from orchestrator.cluster.member import Function

IDLE_S = 10.0  # that a group waits for the next run; then its CPUs are others'
END_S = 20.0  # that one has to end
Resources = dict[str, dict[str, float]]  # node id -> {"CPU": ..., "GPU": ...}


class Crews:
    """The groups of one driver, of which one may be idle. idle_s: how long it stays so; 0 = it ends at once."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s, self._mailbox = idle_s, Mailbox()
        self._idle: Group | None = None
        self._ending: list[Group] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, size: Size, function: Function, job: Any, name: str) -> Group:
        """A group of that size that runs `function(job, context)`: the idle one where it fits, else a new one."""
        group, self._idle = self._idle, None
        if group is not None:
            if fits(group, size) and group.give(function, job):
                return group
            self.end(group)
            self.settle()
        group = Group(size, self._mailbox, name)
        group.give(function, job)
        return group

    def give_back(self, group: Group) -> None:
        """It did its work, and all its workers wait."""
        if self._idle_s and group.rest(self._idle_s):
            self._idle = group
        else:
            self.end(group)

    def end(self, group: Group) -> None:
        """It cannot be used again. Does not wait for its end."""
        group.dismiss()
        self._ending.append(group)

    def settle(self) -> None:
        """Waits until those that are to end are gone, END_S at most: Ray's session, ended under a group's thread, would
        end this process too, without a word."""
        until = time.monotonic() + END_S
        self._ending = [group for group in self._ending if not group.wait(max(0.0, until - time.monotonic()))]

    def idle(self) -> Resources:
        """What the idle group holds, which is free for who takes it; from now on it waits anew."""
        group = self._idle
        if group is None or not group.rest(self._idle_s):
            return {}
        each = {"CPU": float(group.size.cpus), "GPU": float(group.size.gpus)}
        return {node: {what: count * n for what, n in each.items()} for node, count in group.nodes.items()}

    def admits(self, size: Size) -> bool:
        """Whether a group of that size need not wait for CPUs of the idle one, which is ended where it does not fit."""
        group = self._idle
        if group is None or fits(group, size):
            return True
        self._idle = None
        self.end(group)
        self.settle()
        return False

    def close(self) -> None:
        """Leaves no process behind."""
        if self._idle is not None:
            self.end(self._idle)
            self._idle = None
        self.settle()
        self._mailbox.close()


def fits(group: Group, size: Size) -> bool:
    """Whether its workers are as many and as large as asked for, and where they may be."""
    alike = replace(group.size, nodes=size.nodes) == size
    return alike and (not size.nodes or set(group.nodes) <= set(size.nodes))
