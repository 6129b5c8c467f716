"""How far a long command is: a progress bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

from jobs import edge

SECONDS = 5  # between lines


class Bar:
    """One bar for each thing that is counted. Lines go to stdout, so that `ray job logs` shows them."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<6}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, disable=not sys.stdout.isatty())
        self._tasks: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._said = time.monotonic()

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

    def _show(self, what: str, done: int, total: int, unit: int, units: str) -> None:
        now = time.monotonic()
        if what not in self._tasks:
            self._began[what] = now
            self._tasks[what] = self._progress.add_task(what, total=total, rate="")
        rate = done / max(now - self._began[what], 1e-9)
        shown = f"{done // unit:,} of {total // unit:,} {units}"
        self._progress.update(self._tasks[what], completed=done, rate=shown)  # type: ignore[arg-type]
        if self._progress.disable and now - self._said > SECONDS and now > self._began[what]:
            self._said = now
            edge.say(f"{what} {shown}, {rate / unit:,.0f} a second, {(total - done) / rate:.0f} s left")
