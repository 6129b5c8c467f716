"""Saves on a thread of its own: a step waits for the copy of its tensors, never for storage."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.state.checkpoints import Checkpoints
from orchestrator.state.memory import Memory
from orchestrator.state.packed import Progress, Staging, Tensors

REMIND_S = 600.0  # between two words about the same trouble
SPARE = 2  # memory that is kept for the next copies: one is written while another is filled


@dataclass(frozen=True)
class _Task:
    """A copy that waits to be written, or is. `then` is None for one that goes to memory alone."""

    staging: Staging
    progress: Progress
    then: Callable[[str], None] | None


class BackgroundSaver:
    """Writes copies of a run's state: one at a time, and at most one waits, the newest.

    checkpoints: where saves go. memory: where each copy goes first, or None. say: hears, from the thread, of a save
    that was left out because storage takes longer than they are apart, and of memory that takes no copy; now and then.
    """

    def __init__(
        self, checkpoints: Checkpoints, memory: Memory | None = None, say: Callable[[str], None] = print
    ) -> None:
        self._checkpoints, self._memory, self._say = checkpoints, memory, say
        self._changed = threading.Condition()
        self._spare: list[Staging] = []
        self._waiting: _Task | None = None
        self._running = self._closed = False
        self._error: BaseException | None = None
        self._said: dict[str, float] = {}
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def save(self, tensors: Tensors, progress: Progress, then: Callable[[str], None]) -> None:
        """Copies the tensors and returns; `then` hears the name, from the thread, when the checkpoint is whole.

        A save that still waits is left out. Raises what an earlier save raised.
        """
        self._submit(tensors, progress, then)

    def copy(self, tensors: Tensors, progress: Progress) -> None:
        """The same for memory alone; nothing where a save waits, which comes to memory too, or without a memory."""
        with self._changed:
            needless = self._memory is None or (self._waiting is not None and self._waiting.then is not None)
        if not needless:
            self._submit(tensors, progress, None)

    def wait(self) -> None:
        """Until nothing waits and nothing is written; raises what a save raised."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running and self._waiting is None)
        self._raise()

    def close(self) -> None:
        """Waits and ends the thread; raises what a save raised."""
        try:
            self.wait()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._thread.join()

    # -- the caller's thread -------------------------------------------------------------------------------------

    def _submit(self, tensors: Tensors, progress: Progress, then: Callable[[str], None] | None) -> None:
        self._raise()
        with self._changed:
            replaced, self._waiting = self._waiting, None  # from here on nobody else has its memory
            staging = replaced.staging if replaced else self._spare.pop() if self._spare else Staging()
        staging.fill(tensors)
        with self._changed:
            self._waiting = _Task(staging, progress, then)
            self._changed.notify_all()
        if replaced and replaced.then:
            self._remind(
                "storage",
                f"storage takes longer than checkpoints are apart: the one of step {replaced.progress.step} was left "
                f"out for that of step {progress.step}; raise train.checkpoint_steps or train.checkpoint_minutes",
            )

    def _raise(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    # -- the saver's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (task := self._next()) is not None:
            error: BaseException | None = None
            try:
                self._run(task)
            except BaseException as raised:  # of any kind: the caller hears it
                error = raised
            with self._changed:
                self._running, self._error = False, self._error or error
                self._give_back(task.staging)
                self._changed.notify_all()

    def _next(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            task, self._waiting = self._waiting, None
            self._running = task is not None
            return task

    def _run(self, task: _Task) -> None:
        packed = task.staging.packed(task.progress)
        if self._memory is not None and not self._memory.put(packed):
            self._remind("memory", self._memory.reason)
        self._prepare(task.staging)
        if task.then is not None:
            task.then(self._checkpoints.save(packed))

    def _prepare(self, used: Staging) -> None:
        """Memory like this one for the next copy, which need not pay for fresh pages then."""
        with self._changed:
            enough = bool(self._spare)
        if not enough:
            staging = Staging()
            staging.reserve(used.nbytes, pinned=used.pinned)
            with self._changed:
                self._give_back(staging)

    def _give_back(self, staging: Staging) -> None:
        self._spare = [*self._spare, staging][-SPARE:]

    def _remind(self, trouble: str, text: str) -> None:
        now = time.monotonic()
        if now - self._said.get(trouble, -REMIND_S) >= REMIND_S:
            self._said[trouble] = now
            self._say(text)
