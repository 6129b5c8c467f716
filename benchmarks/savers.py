"""Ways of saving a run's state, for `benchmarks.checkpoint`: this project's, and those of torch."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.state_dict_saver import async_save

from orchestrator.state.checkpoints import Checkpoints
from orchestrator.state.memory import SHM, Memory
from orchestrator.state.packed import Progress, Tensors
from orchestrator.state.saver import BackgroundSaver
from orchestrator.state.storage import Storage


class Way(Protocol):
    """A way of saving."""

    def save(self, state: Tensors, step: int, done: Callable[[], None]) -> None:
        """What the training calls; `done` is called, by any thread, when all is written."""

    def wait(self) -> None:
        """Until all is written."""


class Ours:
    """This project's saver, into a folder, and into memory as well where that is said."""

    def __init__(self, folder: Path, memory: Memory | None = None) -> None:
        self._saver = BackgroundSaver(Checkpoints(Storage(str(folder)), keep=1), memory)
        self._memory = memory

    def save(self, state: Tensors, step: int, done: Callable[[], None]) -> None:
        self._saver.save(state, _progress(step), lambda _: done())

    def wait(self) -> None:
        self._saver.wait()

    def close(self) -> None:
        self._saver.close()
        if self._memory:
            self._memory.clear()


@dataclass
class InTheStep:
    """torch.save to a file, in place of the one before."""

    folder: Path

    def save(self, state: Tensors, step: int, done: Callable[[], None]) -> None:
        torch.save(state, self.folder / "new.pt")
        (self.folder / "new.pt").replace(self.folder / "state.pt")
        done()

    def wait(self) -> None: ...


@dataclass
class Torchs:
    """torch.distributed.checkpoint.async_save, of one process; it goes on by itself after its copy."""

    folder: Path
    _future: Any = field(default=None, init=False)

    def save(self, state: Tensors, step: int, done: Callable[[], None]) -> None:
        self._future = async_save(dict(state), checkpoint_id=self.folder / str(step), no_dist=True)
        self._future.add_done_callback(lambda _: done())

    def wait(self) -> None:
        self._future.result()
        for place in self.folder.iterdir():  # it has no end to what is kept; this is not timed
            shutil.rmtree(place)


@contextmanager
def ways(folder: Path) -> Iterator[dict[str, Way]]:
    """Each by its name, with a folder of its own."""
    places = [folder / str(number) for number in range(4)]
    for place in places:
        place.mkdir()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist says so itself
        ours, both = Ours(places[0]), Ours(places[1], Memory(f"benchmark-{os.getpid()}", SHM))
        for saver in (ours, both):
            stack.callback(saver.close)
        yield {
            "skiplane": ours,
            "skiplane, into memory too": both,
            "torch.save in the step": InTheStep(places[2]),
            "torch's async_save": Torchs(places[3]),
        }


def _progress(step: int) -> Progress:
    return Progress(step=step, epoch=0, digest=0, sums={}, total={}, curve=[], bad=0, seconds=0.0)
