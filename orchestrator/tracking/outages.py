"""What does not answer now, of the servers, runs and storages that journals are sent by: said once, as is its end."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.tracking.shipment import Receiver, Shipment

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
HURRIED_PAUSE_S = 0.5
FAILED_S = 300.0  # until a run that cannot be sent is asked again: somebody may have restored it

Tell = Callable[[dict[str, Any]], None]


@dataclass(eq=False)
class Outage:
    """Something that may not answer: when it is asked again."""

    until: float = 0.0
    pause: float = 0.0  # 0: it answers

    def failed(self, longest: float) -> None:
        """Waits longer each time."""
        self.pause = min(max(2 * self.pause, FIRST_PAUSE_S), longest)
        self.wait(self.pause)

    def wait(self, seconds: float) -> None:
        """Is not asked for so long."""
        self.until = time.monotonic() + seconds

    def hurry(self) -> None:
        """Waits no longer than a moment."""
        self.until = min(self.until, time.monotonic() + HURRIED_PAUSE_S)

    def end(self) -> None:
        """It answers."""
        self.pause = self.until = 0.0


@dataclass(eq=False)
class Link:
    """One server, for all its runs: who is away for one is away for all, until it answers another."""

    uri: str
    outage: Outage = field(default_factory=Outage)
    server: Receiver | None = None
    failing: set["Run"] = field(default_factory=set)  # those that it did not answer, the last time


@dataclass(eq=False)
class Run:
    """One that is sent."""

    place: str
    link: Link
    outage: Outage = field(default_factory=Outage)
    shipment: Shipment | None = None
    look: bool = True  # there may be something to send
    closing: bool = False
    alone: bool = False  # its server answers others, so it is asked by this run's own pauses
    failed: bool = False  # it cannot be sent until somebody repairs something

    @property
    def due(self) -> float:
        """When it is asked again; in the past for one that answers."""
        return max(self.outage.until, self.link.outage.until)


class Outages:
    """Which there are. Not for two threads at once."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._away = tell, set[Outage]()
        self._longest = LONGEST_PAUSE_S

    def hurry(self, runs: Iterable[Run]) -> None:
        """Pauses are short from now on."""
        self._longest = HURRIED_PAUSE_S
        for run in runs:
            run.outage.hurry()
            run.link.outage.hurry()

    def of_server(self, run: Run, error: Exception) -> None:
        """A run's server did not answer it. The others wait too, unless they have been answered meanwhile."""
        run.outage.failed(self._longest)
        if not run.alone:
            run.link.outage.failed(self._longest)
        run.link.failing.add(run)
        self._begins(run.link.outage, error)

    def of_run(self, run: Run, error: Exception) -> None:
        """A run's storage does not answer, or the run that it is part of is not there."""
        run.outage.failed(self._longest)
        self._begins(run.outage, error)

    def of_artifacts(self, run: Run, error: Exception) -> None:
        """A run's server answers, and cannot store something."""
        self._server_answers(run)
        self.of_run(run, error)

    def answered(self, run: Run) -> None:
        """All went well."""
        self._server_answers(run)
        self.ended(run)

    def ended(self, run: Run) -> None:
        """Nothing is wrong with the run itself, or nobody asks any more."""
        run.link.failing.discard(run)
        run.outage.end()
        self._ends(run.outage)

    def _server_answers(self, run: Run) -> None:
        """Whom it did not answer is asked again at once, and after that by its own pauses."""
        run.alone = False
        run.link.failing.discard(run)
        run.link.outage.end()
        for other in run.link.failing:
            if not other.alone:
                other.alone, other.outage.until = True, 0.0
        if not run.link.failing:
            self._ends(run.link.outage)

    def _begins(self, outage: Outage, error: Exception) -> None:
        if outage not in self._away:
            self._away.add(outage)
            self._tell({"event": "away", "text": str(error)})

    def _ends(self, outage: Outage) -> None:
        if outage in self._away:
            self._away.remove(outage)
            if not self._away:
                self._tell({"event": "back"})
