"""A server for tests of shipping, in memory: it takes, refuses, is away, or loses its answer, as it is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.state.storage import Storage
from orchestrator.tracking.delivery import Numbered
from orchestrator.tracking.failures import Unreachable
from orchestrator.tracking.journal import Ack
from orchestrator.tracking.records import Open, Record
from orchestrator.tracking.refusals import SetAside
from pipelines.errors import ConfigError


@dataclass
class FakeServer:
    """In the place of orchestrator.tracking.server.Server; a run's id is its record's, with an R before it.

    answers: what the next requests do, before they are fulfilled; then all go well. refuses: records never taken.
    """

    shown: str = "http://h:5000"
    answers: list[Callable[[], None]] = field(default_factory=list)
    refuses: Callable[[Record], bool] = lambda _: False
    deleted: set[str] = field(default_factory=set)
    lose_answer: bool = False  # of the next delivery
    opened: list[tuple[Open, str | None, str | None]] = field(default_factory=list)  # record, parent, known run
    taken: list[tuple[str, int, Record]] = field(default_factory=list)  # doubles and all
    requests: int = 0

    def open(self, record: Open, parent_run_id: str | None, known: Ack | None) -> tuple[str, str]:
        """Notes it."""
        run_id = known.run_id if known else f"R{record.id}"
        self._asked(run_id)
        self.opened.append((record, parent_run_id, known.run_id if known else None))
        return "7", run_id

    def deliver(self, run_id: str, records: Sequence[Numbered], storage: Storage) -> list[SetAside]:
        """Takes what it does not refuse."""
        self._asked(run_id)
        self.taken += [(run_id, number, record) for number, record in records if not self.refuses(record)]
        if self.lose_answer:
            self.lose_answer = False
            raise Unreachable("connection reset")
        return [SetAside(number, "I do not like it", record) for number, record in records if self.refuses(record)]

    def _asked(self, run_id: str) -> None:
        self.requests += 1
        if self.answers:
            self.answers.pop(0)()
        if run_id in self.deleted:
            raise ConfigError(f"MLflow run {run_id} was deleted at {self.shown}; restore it")


def away() -> None:
    """An answer."""
    raise Unreachable("MLflow at http://h:5000 does not answer (connection refused)")
