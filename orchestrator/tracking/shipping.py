"""The process that sends journals to MLflow: `python -m orchestrator.tracking.shipping`, a child of the driver.

Orders come on stdin, events go to stdout, a line of JSON each:

    {"do": "serve", "place": P, "uri": U}   from now on, from where the run in P was acknowledged
    {"do": "kick", "place": P}              there is more
    {"do": "close", "place": P}             no more comes: forgotten when all is sent
    {"do": "forget", "place": P}            at once
    {"do": "hurry"}                         the driver waits: pauses are short from now on

    {"event": "opened", "place": P, "experiment_id": E, "run_id": R}
    {"event": "failed", "place": P, "exit": N, "text": T}       nothing more is tried, until it is served anew
    {"event": "shipped", "place": P, "next": N, "refused": N}   after each delivery
    {"event": "refused", "place": P, "text": T}                 records that the server will never take
    {"event": "away", "text": T}, {"event": "back"}             once an outage

It ends with stdin, after the request under way: what is not acknowledged is sent by the next one.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.tracking.connection import load
from orchestrator.tracking.failures import Unreachable, Waiting
from orchestrator.tracking.journal import REFUSED
from orchestrator.tracking.server import Server
from orchestrator.tracking.shipment import Opened, Receiver, Sent, Shipment, storage_of
from pipelines.errors import ClusterError, SkiplaneError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
HURRIED_PAUSE_S = 0.5
ORPHAN_S = 5.0  # between looks whether the driver lives

Tell = Callable[[dict[str, Any]], None]


@dataclass(eq=False)
class Outage:
    """Something that may not answer: when it is asked again."""

    until: float = 0.0
    pause: float = 0.0  # 0: it answers

    def failed(self, now: float, longest: float) -> None:
        """Waits longer each time."""
        self.pause = min(max(2 * self.pause, FIRST_PAUSE_S), longest)
        self.until = now + self.pause


@dataclass(eq=False)
class _Link:
    """One server, for all its runs: who is away for one is away for all."""

    uri: str
    outage: Outage = field(default_factory=Outage)
    server: Receiver | None = None


@dataclass(eq=False)
class _Run:
    place: str
    link: _Link
    outage: Outage = field(default_factory=Outage)  # of its storage, or of the run that comes before
    shipment: Shipment | None = None
    look: bool = True  # there may be something to send
    closing: bool = False
    failed: bool = False

    @property
    def due(self) -> float:
        return max(self.outage.until, self.link.outage.until)


class Shipping:
    """Any number of runs, one delivery at a time, in turn. Orders come from another thread than `run` is called in."""

    def __init__(self, tell: Tell, server: Callable[[str], Receiver] = Server) -> None:
        self._tell, self._server = tell, server
        self._runs, self._links, self._away = dict[str, _Run](), dict[str, _Link](), set[Outage]()
        self._changed, self._ended = threading.Condition(), False
        self._longest, self._parent = LONGEST_PAUSE_S, os.getppid()

    # -- orders ----------------------------------------------------------------------------------------------------

    def order(self, said: dict[str, str]) -> None:
        """One line of stdin."""
        with self._changed:
            if said["do"] == "hurry":
                self._hurry()
            elif said["do"] == "serve":
                self._forget(said["place"])
                link = self._links.setdefault(said["uri"], _Link(said["uri"]))
                link.outage.until = 0.0  # who comes wants to know how it is now
                self._runs[said["place"]] = _Run(said["place"], link)
            elif said["do"] == "forget":
                self._forget(said["place"])
            elif run := self._runs.get(said["place"]):
                run.closing = run.closing or said["do"] == "close"
                run.look = not run.failed
            self._changed.notify_all()

    def end(self) -> None:
        """`run` returns, after the delivery under way."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _hurry(self) -> None:
        self._longest = HURRIED_PAUSE_S
        for run in self._runs.values():
            for outage in (run.outage, run.link.outage):
                outage.until = min(outage.until, time.monotonic() + HURRIED_PAUSE_S)

    def _forget(self, place: str) -> None:
        if run := self._runs.pop(place, None):
            self._works(run.outage)

    # -- deliveries ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Delivers until the end, or until the driver has died."""
        while run := self._next():
            self._turn(run)

    def _next(self) -> _Run | None:
        """The run whose turn it is. Nothing is looked at that nobody spoke of."""
        with self._changed:
            while not self._ended and os.getppid() == self._parent:
                now, waiting = time.monotonic(), [run for run in self._runs.values() if run.look]
                for run in waiting:
                    if run.due <= now:
                        self._runs[run.place] = self._runs.pop(run.place)  # the others come first, next time
                        run.look = False
                        return run
                self._changed.wait(min([ORPHAN_S, *(run.due - now for run in waiting)]))
        return None

    def _turn(self, run: _Run) -> None:
        try:
            more = self._step(run)
        except Waiting as error:
            self._fails(run, run.outage, error)
        except Unreachable as error:
            self._fails(run, run.link.outage, error)
        except ClusterError as error:  # of its storage
            self._fails(run, run.outage, error)
        except SkiplaneError as error:
            self._give_up(run, error.exit_code, str(error))
        except Exception:  # one run's trouble is not the others'
            text = traceback.format_exc().replace(run.link.uri, "URI")
            print(text, file=sys.stderr, flush=True)
            cause = text.splitlines()[-1]
            self._give_up(run, ClusterError.exit_code, f"the journal in {run.place} cannot be sent to MLflow ({cause})")
        else:
            self._went_well(run, more)

    def _step(self, run: _Run) -> bool:
        if run.link.server is None:
            run.link.server = self._server(run.link.uri)
        if run.shipment is None:
            run.shipment = Shipment(storage_of(run.place), run.link.server, lambda event: self._told(run, event))
            self._tell_shipped(run.place, run.shipment.next, run.shipment.refused)
        return run.shipment.step()

    def _told(self, run: _Run, event: Opened | Sent) -> None:
        if isinstance(event, Opened):
            self._tell({"event": "opened", "place": run.place, **vars(event)})
            self._wake_parts(run.place)
            return
        self._tell_shipped(run.place, event.next, event.refused)
        if event.aside:
            first, more = event.aside[0], len(event.aside) - 1
            others = f", and {more:,} more" if more else ""
            text = f"record {first.number:,} of {run.place} ({first.reason}){others}; see {REFUSED} there"
            self._tell({"event": "refused", "place": run.place, "text": text})

    def _wake_parts(self, place: str) -> None:
        """They may have waited for this run."""
        with self._changed:
            for run in self._runs.values():
                if run.place.startswith(f"{place}/"):
                    run.outage.until = 0.0

    def _tell_shipped(self, place: str, number: int, refused: int) -> None:
        self._tell({"event": "shipped", "place": place, "next": number, "refused": refused})

    def _went_well(self, run: _Run, more: bool) -> None:
        with self._changed:
            self._works(run.outage)
            if more:
                self._works(run.link.outage)
                run.look = True
            elif run.closing and not run.look and self._runs.get(run.place) is run:
                self._forget(run.place)

    def _fails(self, run: _Run, outage: Outage, error: Exception) -> None:
        with self._changed:
            if self._runs.get(run.place) is not run:
                return  # forgotten meanwhile
            run.look = True
            outage.failed(time.monotonic(), self._longest)
            if outage not in self._away:
                self._away.add(outage)
                self._tell({"event": "away", "text": str(error)})

    def _works(self, outage: Outage) -> None:
        outage.pause = outage.until = 0.0
        if outage in self._away:
            self._away.remove(outage)
            if not self._away:
                self._tell({"event": "back"})

    def _give_up(self, run: _Run, code: int, text: str) -> None:
        with self._changed:
            run.failed, run.look = True, False
            if self._runs.get(run.place) is run:
                self._tell({"event": "failed", "place": run.place, "exit": code, "text": text})


def main() -> None:
    """Ctrl-C reaches every process of a terminal, and the driver decides what it means; SIGTERM ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what MLflow prints is no event
    lock = threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")

    shipping = Shipping(tell)
    threading.Thread(target=_listen, args=(shipping,), name="skiplane-orders", daemon=True).start()
    load()
    shipping.run()


def _listen(shipping: Shipping) -> None:
    """Unbuffered: at the end of a process, Python waits for the lock of a buffer."""
    try:
        with open(0, "rb", buffering=0, closefd=False) as orders:
            for line in orders:
                shipping.order(json.loads(line))
    finally:
        shipping.end()


if __name__ == "__main__":
    main()
