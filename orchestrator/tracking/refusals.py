"""Records that the server will never take: set aside in the run's folder, `tracking/refused.jsonl`, with the reason."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.state.storage import Storage
from orchestrator.tracking.journal import REFUSED
from orchestrator.tracking.records import Record, from_line, to_line
from pipelines.errors import DataError


@dataclass(frozen=True)
class SetAside:
    """A record, or the part of it that is refused; the line as it was, where it is no record."""

    number: int
    reason: str
    record: Record | str

    def to_line(self) -> bytes:
        """One line of JSON."""
        record = self.record if isinstance(self.record, str) else json.loads(to_line(self.record))
        return json.dumps({"number": self.number, "reason": self.reason, "record": record}).encode() + b"\n"

    @classmethod
    def of(cls, said: dict[str, Any]) -> "SetAside":
        """What a line says."""
        record = said["record"]
        return cls(
            said["number"],
            said["reason"],
            record if isinstance(record, str) else from_line(json.dumps(record).encode()),
        )


def keep(storage: Storage, refused: Sequence[SetAside]) -> None:
    """Adds to what is there: a handful, or the file would be written again and again."""
    if refused:
        storage.write(REFUSED, (storage.read(REFUSED) or b"") + b"".join(aside.to_line() for aside in refused))


def kept(storage: Storage) -> list[SetAside]:
    """All of them; one that was refused twice stands there twice. Raises DataError."""
    try:
        return [SetAside.of(json.loads(line)) for line in (storage.read(REFUSED) or b"").splitlines()]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{storage.place}/{REFUSED} is damaged ({error}); remove it, or its bad lines, and look again"
        ) from error
