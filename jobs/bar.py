"""How far a long command is: a progress bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs import edge

if TYPE_CHECKING:
    from rich.progress import TaskID

SECONDS = 5  # between lines


@dataclass(frozen=True)
class _Counted:
    """One thing that is counted, and where it stood when it was first heard of: the rate is of what came since."""

    task: "TaskID"
    began: float
    done: int


class Bar:
    """One bar for each thing that is counted. Lines go to stdout, so that `ray job logs` shows them."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<6}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, disable=not sys.stdout.isatty())
        self._counted: dict[str, _Counted] = {}
        self._said = 0.0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """So many images of a split are done."""
        self._show(what, done, total, 1, "images")

    def show_bytes(self, what: str, done: int, total: int) -> None:
        """So many bytes are done."""
        self._show(what, done, total, 1_000_000, "MB")

    def show_records(self, what: str, done: int, total: int) -> None:
        """So many records of a journal are sent."""
        self._show(what, done, total, 1, "records")

    def _show(self, what: str, done: int, total: int, unit: int, units: str) -> None:
        now = time.monotonic()
        if what not in self._counted:
            self._counted[what] = _Counted(self._progress.add_task(what, total=total, shown=""), now, done)
            self._said = now  # a rate over a moment would mislead
        first = self._counted[what]
        rate = (done - first.done) / max(now - first.began, 1e-9)
        amount = f"{done // unit:,} of {total // unit:,} {units}"
        shown = f"{amount}, {rate / unit:,.0f} a second"
        self._progress.update(first.task, completed=done, shown=shown)
        if self._progress.disable and now - self._said > SECONDS and done > first.done:
            self._said = now
            edge.say(f"{what} {shown}, {(total - done) / rate:.0f} s left")
