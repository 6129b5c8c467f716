"""Records that the server did not take: set aside in the run's folder, `tracking/refused.jsonl`, with the reason."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal
from orchestrator.tracking.journal import REFUSED
from orchestrator.tracking.records import File, Model, Points, Record, Tags, from_line, to_line
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


def replace(storage: Storage, refused: Sequence[SetAside]) -> None:
    """In place of what is there."""
    if refused or storage.read(REFUSED) is not None:
        storage.write(REFUSED, b"".join(aside.to_line() for aside in refused))


def again(storage: Storage) -> tuple[list[SetAside], list[SetAside]]:
    """(those that may be sent again, those that stay): a status that comes late would end a run that goes on.

    A file or tag that a later record replaces is in neither. Raises DataError.
    """
    newest, send, stay = _newest(storage), list[SetAside](), list[SetAside]()
    for aside in {aside.to_line(): aside for aside in kept(storage)}.values():
        if not isinstance(aside.record, Points | Tags | File | Model):
            stay.append(aside)
        elif all(newest.get(name, 0) <= aside.number for name in _replaced(aside.record)):
            send.append(aside)
    return send, stay


def _newest(storage: Storage) -> dict[tuple[str, str], int]:
    """The record that has the last word on each file and tag."""
    newest = dict[tuple[str, str], int]()
    for number, line in journal.lines(storage):
        with contextlib.suppress(DataError):
            newest |= dict.fromkeys(_replaced(from_line(line)), number)
    return newest


def _replaced(record: Record) -> list[tuple[str, str]]:
    """Of what others of its kind a record takes the place."""
    if isinstance(record, File):
        return [("file", record.name)]
    return [("tag", key) for key in record.values] if isinstance(record, Tags) else []


def kept(storage: Storage) -> list[SetAside]:
    """All of them; one that was refused twice stands there twice. Raises DataError."""
    try:
        return [SetAside.of(json.loads(line)) for line in (storage.read(REFUSED) or b"").splitlines()]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{storage.place}/{REFUSED} is damaged ({error}); remove it, or its bad lines, and look again"
        ) from error
