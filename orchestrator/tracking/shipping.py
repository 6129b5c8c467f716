"""The process that sends journals to MLflow: `python -m orchestrator.tracking.shipping`, a child of the driver.

Orders come on stdin, events go to stdout, a line of JSON each:

    {"do": "serve", "place": P, "uri": U}   from now on, from where the run in P was acknowledged
    {"do": "kick", "place": P}              there is more
    {"do": "close", "place": P}             no more comes: forgotten when all is sent
    {"do": "forget", "place": P}            at once
    {"do": "hurry"}                         the driver waits: pauses are short from now on

    {"event": "opened", "place": P, "experiment_id": E, "run_id": R}
    {"event": "failed", "place": P, "exit": N, "text": T}       somebody must repair it; said once, asked now and then
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
from typing import Any

from orchestrator.tracking.connection import load
from orchestrator.tracking.failures import Unreachable, Unstored, Waiting
from orchestrator.tracking.journal import REFUSED
from orchestrator.tracking.outages import FAILED_S, Link, Outages, Run, Tell
from orchestrator.tracking.server import Server
from orchestrator.tracking.shipment import Opened, Receiver, Sent, Shipment, storage_of
from pipelines.errors import ClusterError, SkiplaneError

ORPHAN_S = 5.0  # between looks whether the driver lives


class Shipping:
    """Any number of runs, one delivery at a time, in turn. Orders come from another thread than `run` is called in."""

    def __init__(self, tell: Tell, server: Callable[[str], Receiver] = Server) -> None:
        self._tell, self._server = tell, server
        self._runs, self._links, self._outages = dict[str, Run](), dict[str, Link](), Outages(tell)
        self._changed, self._ended, self._parent = threading.Condition(), False, os.getppid()

    # -- orders ----------------------------------------------------------------------------------------------------

    def order(self, said: dict[str, str]) -> None:
        """One line of stdin."""
        with self._changed:
            if said["do"] == "hurry":
                self._outages.hurry(self._runs.values())
            elif said["do"] == "serve":
                self._forget(said["place"])
                link = self._links.setdefault(said["uri"], Link(said["uri"]))
                link.outage.until = 0.0  # who comes wants to know how it is now
                self._runs[said["place"]] = Run(said["place"], link)
            elif said["do"] == "forget":
                self._forget(said["place"])
            elif run := self._runs.get(said["place"]):
                run.closing = run.closing or said["do"] == "close"
                run.look = True
            self._changed.notify_all()

    def end(self) -> None:
        """`run` returns, after the delivery under way."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _forget(self, place: str) -> None:
        if run := self._runs.pop(place, None):
            self._outages.ended(run)

    # -- deliveries ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Delivers until the end, or until the driver has died."""
        while run := self._next():
            self._turn(run)

    def _next(self) -> Run | None:
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

    def _turn(self, run: Run) -> None:
        try:
            more = self._step(run)
        except Unstored as error:
            self._fails(run, self._outages.of_artifacts, error)
        except (Waiting, ClusterError) as error:  # of its storage
            self._fails(run, self._outages.of_run, error)
        except Unreachable as error:
            self._fails(run, self._outages.of_server, error)
        except SkiplaneError as error:
            self._give_up(run, error.exit_code, str(error))
        except Exception:  # one run's trouble is not the others'
            text = traceback.format_exc().replace(run.link.uri, "URI")
            if not run.failed:
                print(text, file=sys.stderr, flush=True)
            cause = text.splitlines()[-1]
            self._give_up(run, ClusterError.exit_code, f"the journal in {run.place} cannot be sent to MLflow ({cause})")
        else:
            self._went_well(run, more)

    def _step(self, run: Run) -> bool:
        if run.link.server is None:
            run.link.server = self._server(run.link.uri)
        if run.shipment is None:
            run.shipment = Shipment(storage_of(run.place), run.link.server, lambda event: self._told(run, event))
            self._tell_shipped(run.place, run.shipment.next, run.shipment.refused)
        return run.shipment.step()

    def _told(self, run: Run, event: Opened | Sent) -> None:
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

    def _went_well(self, run: Run, more: bool) -> None:
        with self._changed:
            if more:
                self._outages.answered(run)
                run.look, run.failed = True, False
                return
            self._outages.ended(run)
            if run.closing and not run.look and self._runs.get(run.place) is run:
                self._forget(run.place)

    def _fails(self, run: Run, away: Callable[[Run, Exception], None], error: Exception) -> None:
        with self._changed:
            if self._runs.get(run.place) is run:  # and was not forgotten meanwhile
                run.look = True
                away(run, error)

    def _give_up(self, run: Run, code: int, text: str) -> None:
        """Said once; asked again now and then, for a run that is restored goes on."""
        with self._changed:
            if self._runs.get(run.place) is not run:
                return
            self._outages.ended(run)
            run.outage.wait(FAILED_S)
            run.look = True
            if not run.failed:
                run.failed = True
                self._tell({"event": "failed", "place": run.place, "exit": code, "text": text})


def main() -> None:
    """Ctrl-C reaches every process of a terminal, SIGTERM all that a Ray job has started: the driver decides what they
    mean. This process ends with its stdin, or when the driver has died."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
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
