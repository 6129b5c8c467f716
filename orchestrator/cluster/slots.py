"""A slot: a process that trains one trial after the other, in a thread, so that it can be asked to stop meanwhile."""

import queue
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray import tune

from orchestrator.cluster import environment
from orchestrator.cluster.crews import Crews
from orchestrator.context import Record
from orchestrator.stop import Stop

LISTEN_S, LOOK_S = 2.0, 0.3  # a slot speaks at least so often, and looks so often whether it should stop
IDLE_S = 3.0  # that workers wait for their slot's next trial: those of another slot may need their CPUs
END_S = 60.0  # that a trial may take to save its state
Outcome = dict[str, Any]
# (what to train, who is told of it, who may ask for its end, the slot's workers) -> how it ended; runs in a slot, so it
# must be importable.
Train = Callable[[str, Callable[[Record], None], Stop, Crews], Outcome]


class Slot(tune.Trainable):
    """A process that trains one trial after the other."""

    def setup(self, config: dict[str, Any], train: Train | None = None, board: Any = None) -> None:
        """Begins the first one."""
        assert train is not None
        environment.for_driver()
        self._train, self._board, self._crews = train, board, Crews(IDLE_S)
        self._work = _Work(train, config["what"], self._crews)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins the next one: the one before has ended."""
        self.config = new_config
        self._work = _Work(self._train, new_config["what"], self._crews)
        return True

    def step(self) -> dict[str, Any]:
        """What was heard since the last call; waits for it for a while."""
        until = time.monotonic() + LISTEN_S
        news = list[Record]()
        while not news and time.monotonic() < until and self._work.alive:
            if why := ray.get(self._board.read.remote(self.config["id"])):
                self._work.stop.ask(why)
            news = self._work.news(LOOK_S)
        outcome = self._work.outcome()
        return {"news": news + self._work.news(0), "outcome": [outcome] if outcome else [], "done": outcome is not None}

    def cleanup(self) -> None:
        """Ends what still runs."""
        self._work.end()
        self._crews.close()


class _Work:
    """A trial in a thread of its own."""

    def __init__(self, train: Train, what: str, crews: Crews) -> None:
        self.stop = Stop()
        self._news: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, args=(train, what, crews), name="trial", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def news(self, wait_s: float) -> list[Record]:
        """What was said; waits for the first."""
        found: list[Record] = []
        with suppress(queue.Empty):
            found.append(self._news.get(timeout=wait_s) if wait_s else self._news.get_nowait())
            while True:
                found.append(self._news.get_nowait())
        return found

    def outcome(self) -> Outcome | None:
        """How it ended; None while it trains."""
        return None if self.alive else self._outcome

    def end(self) -> None:
        """Asks for an end and waits for it."""
        self.stop.ask("the end of the sweep")
        self._thread.join(END_S)

    def _run(self, train: Train, what: str, crews: Crews) -> None:
        try:
            self._outcome = train(what, self._news.put, self.stop, crews)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._outcome = {
                "state": "failed",
                "reason": f"{type(error).__name__}: {error} ({place.filename}:{place.lineno}); please report it",
            }
