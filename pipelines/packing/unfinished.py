"""A job that can stop anywhere and go on: what it is, which of its shards are done, and what is left of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelines.dataset import ASKED_AT_ONCE, MANIFEST, UNFINISHED
from pipelines.errors import ConfigError, DataError
from pipelines.packing.done import Done
from pipelines.packing.run import Run, Tell
from pipelines.packing.target import PLAN, Target

Bad = Literal["refuse", "skip"]  # what happens to images that cannot be decoded
Place = tuple[str, int]  # split and number of a shard


class Task(Protocol):
    """One shard to make; goes to another process. Its text names it."""

    @property
    def split(self) -> str: ...

    @property
    def number(self) -> int: ...

    def run(self, target: Target, bad: Bad, tell: Tell, threads: int) -> Done:
        """Raises DataError for what cannot be read, or is refused."""


@dataclass(frozen=True)
class Contents:
    """What came of a job."""

    classes: tuple[str, ...]
    shards: Mapping[str, Sequence[Done]]  # by split, in order
    measured: Mapping[str, Any] = field(default_factory=dict)  # for `made`, beside how it was asked for


class Job(Protocol):
    """All that is to be made."""

    @property
    def made(self) -> Mapping[str, Any]:
        """How, as far as it is known before."""

    @property
    def shards(self) -> Mapping[str, int]:
        """How many, by split."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """By split, in what progress is told."""

    @property
    def adopts(self) -> bool:
        """Whether the tars lie there already, perhaps in the target."""

    @property
    def few(self) -> bool:
        """Whether it is done sooner than other processes have started."""

    @property
    def paths(self) -> Sequence[Path]:
        """What has to be there wherever tasks are done."""

    def task(self, split: str, number: int) -> Task:
        """What makes a shard."""

    def size(self, split: str, number: int) -> int:
        """Of a shard, in what progress is told."""

    def refusal(self, split: str, name: str, reason: str) -> DataError:
        """What --bad refuse says of an image."""

    def contents(self, shards: Mapping[str, Sequence[Done]]) -> "Contents":
        """What its finished shards, in order, are together. Raises DataError."""


def tar_name(split: str, number: int) -> str:
    """Of a shard that packing writes."""
    return f"{split}-{number:06d}.tar"


class Unfinished:
    """A job at its target. Made under the target's lock.

    Raises ConfigError where the target holds something else, or the beginning of another job.
    """

    def __init__(self, job: Job, target: Target) -> None:
        self._job, self._target = job, target
        self._places = [(split, number) for split, count in job.shards.items() for number in range(count)]
        self.done: dict[Place, Done] = {}
        text = json.dumps({"made": dict(job.made), "shards": dict(job.shards)})
        if (begun := self._begun()) is None:
            self._check_free()
            if not target.create(PLAN, text.encode()):
                raise target.busy()
            return
        self.done = self._found()
        if begun != (plan := json.loads(text)):
            self._take_over(begun, plan)
            target.write(PLAN, text.encode())

    @property
    def total(self) -> int:
        """Shards in all."""
        return len(self._places)

    @property
    def kept(self) -> str:
        """What an earlier end leaves, for people."""
        return f"{len(self.done):,} of {self.total:,} shards are done and kept: the same command goes on"

    def finish(self, bad: Bad, run: Run, progress: Callable[[str, int, int], None]) -> None:
        """Makes what is missing. progress(split, done, in all) also hears of what is done already."""
        if bad == "refuse":
            self._refuse_what_was_left_out()
        tell = self._counter(progress)
        missing = [place for place in self._places if place not in self.done]
        todo = (self._job.task(*place) for place in missing)
        for task, done in run(partial(_make, self._target, bad), todo, tell):
            self.done[task.split, task.number] = done

    def _counter(self, progress: Callable[[str, int, int], None]) -> Callable[[Task, int], None]:
        """Adds up what tasks tell, by split, to what was done before; that is told just before the first of it."""
        counts = dict.fromkeys(self._job.shards, 0)
        for split, number in self.done:
            counts[split] += self._job.size(split, number)
        before = dict(counts)

        def tell(task: Task, more: int) -> None:
            split, total = task.split, self._job.sizes[task.split]
            if done := before.pop(split, 0):
                progress(split, done, total)
            counts[split] += more
            progress(split, counts[split], total)

        return tell

    def _refuse_what_was_left_out(self) -> None:
        for (split, _), done in self.done.items():
            for name, reason in done.left_out:
                raise self._job.refusal(split, name, reason)

    def shards(self, split: str) -> list[Done]:
        """Of a split, in order."""
        return [self.done[split, number] for number in range(self._job.shards[split])]

    def discard(self) -> None:
        """Leaves the target as if nothing had been begun."""
        if not self._job.adopts:
            self._remove_tars(self._job.shards)
        self._target.forget()

    def _begun(self) -> dict[str, Any] | None:
        data = self._target.read(PLAN)
        try:
            return dict(json.loads(data)) if data is not None else None
        except ValueError:  # torn by a loss of power: nothing came after it
            return None

    def _check_free(self) -> None:
        names = {name for name in self._target.names() if name.partition("/")[0] != UNFINISHED}
        mine = {MANIFEST, *(f"{split}.index" for split in self._job.shards)}
        if taken := names & mine if self._job.adopts else names:
            what = "a dataset that was made in another way" if MANIFEST in taken else "something else"
            raise ConfigError(f"--out {self._target.place} holds {what}; name a new folder, or remove it")

    def _take_over(self, begun: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        """Another job is not lost for this one, unless it had not come to anything."""
        was, now = ({**each["made"], "shards": each["shards"]} for each in (begun, plan))
        if self.done:
            raise ConfigError(
                f"--out {self._target.place} holds unfinished packing that was begun in another way "
                f"({differences(was, now)}); give that command again to finish it, name another "
                f"folder, or remove it"
            )
        if begun["made"].get("source") != "tars":
            self._remove_tars(begun["shards"])
        self._check_free()

    def _remove_tars(self, shards: Mapping[str, int]) -> None:
        """Those that came into place just before their packer ended."""
        ours = {tar_name(split, number) for split, count in shards.items() for number in range(count)}
        for name in ours.intersection(self._target.names()):
            self._target.remove(name)

    def _found(self) -> dict[Place, Done]:
        """The shards whose records are whole and whose tars are there."""
        names = [name for name in self._target.names(UNFINISHED) if name.endswith(".done")]
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            found = dict(zip(map(_place, names), pool.map(self._whole, names), strict=True))
        return {place: done for place, done in found.items() if done}

    def _whole(self, name: str) -> Done | None:
        done = Done.decode(self._target.read(name) or b"")
        if done is None or self._job.adopts or not len(done.records):
            return done
        return done if self._target.size(done.tar) == done.size else None


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'shuffle_seed was 0, is 1', for each setting that differs."""
    odd = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    return ", ".join(f"{key} was {_short(was.get(key))}, is {_short(now.get(key))}" for key in odd)


def _make(target: Target, bad: Bad, task: Task, tell: Tell, threads: int) -> Done:
    """Does a task, and writes down that it is done."""
    done = task.run(target, bad, tell, threads)
    target.write(f"{UNFINISHED}/{task.split}-{task.number:06d}.done", done.encode())
    return done


def _place(name: str) -> Place:
    split, _, number = name.rpartition("/")[2].removesuffix(".done").rpartition("-")
    return split, int(number)


def _short(value: object) -> str:
    return "not set" if value is None else str(value)[:32]
