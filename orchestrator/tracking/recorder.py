"""The thread that writes a run's records into its journal, behind the back of whoever has them."""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.state.storage import Storage
from orchestrator.tracking.journal import FILES, Writer
from orchestrator.tracking.records import File, Record, to_line
from pipelines.errors import ClusterError
from pipelines.remote.url import is_url

FOLDER_S, BUCKET_S = 0.5, 5.0  # between writes; what a killed driver can lose, unless a checkpoint brings it again
RETRY_S = 5.0

log = logging.getLogger("skiplane.tracking")


@dataclass(frozen=True)
class _Item:
    line: bytes
    file: str = ""  # its object's name
    content: bytes = field(default=b"", repr=False)


class Recorder:
    """Takes records at once and writes them in order, many at a time. A storage that fails is tried again for ever."""

    def __init__(self, storage: Storage, lease: int, wrote: Callable[[], None]) -> None:
        """wrote: called in the thread, after each write. Raises ClusterError where the journal cannot be read."""
        self._storage, self._writer, self._wrote = storage, Writer(storage, lease), wrote
        self._records = self._writer.next
        self._pause = BUCKET_S if is_url(storage.place) else FOLDER_S
        self._items, self._filled, self._hurry = deque[_Item](), threading.Condition(), threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="skiplane-recorder", daemon=True)
        self._thread.start()

    @property
    def records(self) -> int:
        """In the journal, and waiting to be."""
        with self._filled:
            return self._records

    def put(self, records: Sequence[Record]) -> None:
        """Appends; never waits."""
        self._put([_Item(to_line(record)) for record in records])

    def file(self, content: bytes, name: str) -> None:
        """Appends a file, of which the content is there before the record is; never waits."""
        digest = hashlib.sha256(content).hexdigest()
        self._put([_Item(to_line(File(name, digest)), f"{FILES}/{digest}", content)])

    def close(self, timeout_s: float) -> int:
        """Writes what waits, for `timeout_s` at most, and ends; returns how many records are lost."""
        with self._filled:
            self._ended = True
            self._filled.notify_all()
        self._hurry.set()
        self._thread.join(timeout_s)
        with self._filled:
            return len(self._items)

    def _put(self, items: list[_Item]) -> None:
        with self._filled:
            self._items.extend(items)
            self._records += len(items)
            self._filled.notify_all()

    def _run(self) -> None:
        away = False
        while True:
            with self._filled:
                self._filled.wait_for(lambda: self._items or self._ended)
                items = list(self._items)
            if not items:
                return
            try:
                self._write(items)
            except ClusterError as error:
                if not away:
                    log.warning("the tracking journal cannot be written (%s); training goes on, points wait", error)
                away = True
                time.sleep(RETRY_S)
                continue
            away = False
            self._wrote()
            self._hurry.wait(self._pause)

    def _write(self, items: Sequence[_Item]) -> None:
        """Without the lock: a storage may take minutes."""
        for item in items:
            if item.file:
                self._storage.write(item.file, item.content)
        self._writer.append([item.line for item in items])
        with self._filled:
            for _ in items:
                self._items.popleft()
