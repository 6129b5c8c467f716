"""What a node's workers read from servers comes through here: into the cache, in the order of need, ahead of them.

One worker of the node leads: its threads fetch. The others wait for files, and fetch what they miss themselves; a lock
an entry sees to it that each is fetched once, whoever is faster.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.dataset import Dataset, file_sha256
from pipelines.errors import DataError
from pipelines.index import RECORD, Index
from pipelines.reader import Reader
from pipelines.remote.cache import Cache, Entry, Later, NoRoom
from pipelines.remote.failures import StoreError
from pipelines.remote.needs import Need
from pipelines.remote.news import News, Say, nothing
from pipelines.remote.objects import Objects
from pipelines.remote.patience import REQUEST_S, Patience
from pipelines.remote.shards import CachedShards, RangedShards
from pipelines.remote.transfer import Counter, Fetched, Reads, Transfer
from pipelines.remote.url import is_url
from pipelines.shards import OpenFile

LOOK_S = 0.2  # between looks at what is missing, while nothing is, and between tries of what cannot be had now
AHEAD_S = 20.0  # that the leader tries for a shard before it turns to others; who needs it is more patient
JOIN_S = 1.0  # a thread in the middle of a request is not waited for: it ends with the process


class Plan(Protocol):
    """When shards are needed."""

    def upcoming(self, step: int) -> list[Need]:
        """What is not over at `step`, the soonest first."""


@dataclass(frozen=True)
class How:
    """threads: shards that are fetched at once. wait_s: how long one that cannot be had is tried for. request_s: how
    long a server may take for one answer."""

    leads: bool = True
    threads: int = 8
    wait_s: float = 600.0
    request_s: float = REQUEST_S


class Supply:
    """A streamed dataset on this node, from `step` of its plan until `close`. Any thread may call its methods."""

    def __init__(self, dataset: Dataset, cache: Cache, plan: Plan, how: How, say: Say = nothing, step: int = 0) -> None:
        self.dataset, self.cache, self._plan, self._how = dataset, cache, plan, how
        self._news = News(say)
        self._counter = Counter(self._news)
        self._closed = threading.Event()
        self._objects = Objects(dataset.objects.endpoint, self._patience(how.wait_s), how.request_s)
        self._step = step
        self._entries = {
            name: [Entry(dataset.locate(shard.name), shard.sha256, shard.bytes) for shard in split.shards]
            for name, split in dataset.splits.items()
        }
        self._turn = threading.Lock()
        self._underway: set[str] = set()
        self._complete_until = 0.0  # nothing was missing when somebody looked
        self._failed: dict[str, tuple[float, Exception]] = {}  # sha256 -> when to try again, why
        self._threads = [threading.Thread(target=self._lead, daemon=True) for _ in range(how.threads * how.leads)]
        self._began: float | None = None

    @property
    def fetched(self) -> Fetched:
        """What this process fetched so far."""
        return self._counter.total

    @property
    def reads(self) -> Reads:
        """What this process asked for so far."""
        return self._counter.reads

    def reader(self, split: str, threads: int) -> Reader:
        """A reader of a split; closing it closes its files. Raises DataError."""
        entries = self._entries[split]
        ranged = RangedShards(self._objects, [entry.where for entry in entries])
        sizes = [entry.bytes for entry in entries]
        shards = CachedShards(_Shelf(self, entries), ranged, sizes, threads, self._counter, self._news)
        records = self._index(split)
        self._start()
        return Reader(self.dataset, split, threads, records=records, shards=shards)

    def at(self, step: int) -> None:
        """Training is at this step: what lies before is not needed any more."""
        self._step = step

    def cancel(self) -> None:
        """Ends whatever waits, with an error there."""
        self._closed.set()

    def close(self) -> None:
        """Ends the threads; what is under way is dropped. May be called twice."""
        self.cancel()
        for thread in self._threads:
            if thread.ident:
                thread.join(JOIN_S)

    # -- for readers ---------------------------------------------------------------------------------------------

    def open(self, entry: Entry) -> OpenFile | None:
        """The file of an entry; None while it is not here."""
        return self.cache.open(entry) if is_url(entry.where) else OpenFile.of(entry.where)

    def bring(self, entry: Entry) -> bool:
        """Waits until an entry is here; False where the cache has no room. Raises DataError with name and cause."""
        try:
            again_at, error = self._failed.get(entry.sha256, (0.0, None))
            if error and again_at == FOR_GOOD:
                raise error
            self._fetch(entry, self._how.wait_s)
        except NoRoom as full:
            self._news(f"{full}: samples are read one by one, which is slower")
            return False
        except StoreError as error:
            raise DataError(f"shard {self._patience(self._how.wait_s).told(error)}") from error
        return True

    def damaged(self, entry: Entry, file: OpenFile) -> bool:
        """Whether an open file of an entry is not what it should be; then it is gone. By its descriptor: another
        worker may have put a good one in its place."""
        if not is_url(entry.where) or file_sha256(Path(f"/proc/self/fd/{file.file}")) == entry.sha256:
            return False
        self._news(f"the copy of {entry.where} in {file.path} is damaged: it is fetched again")
        self.cache.forget(entry, file)
        return True

    def _index(self, split: str) -> Index:
        part = self.dataset.splits[split]
        entry = Entry(self.dataset.locate(part.index), part.index_sha256, part.samples * RECORD.itemsize)
        if is_url(entry.where) and self.bring(entry) and (here := self.open(entry)):
            with open(here.file, "rb") as file:  # by its descriptor: its name may be evicted any time
                return self.dataset.parsed(split, file.read())
        return self.dataset.index(split)

    def _fetch(self, entry: Entry, wait_s: float) -> None:
        """Unless it is here, or somebody else brings it meanwhile. Raises NoRoom, StoreError, DataError."""
        store, name = self._objects.store(entry.where)
        patience = self._patience(wait_s)

        def fill(file: int) -> str:
            return Transfer(store, name, entry.bytes, file, self._counter)(patience)

        try:
            if self.cache.bring(entry, fill, self._later(entry), self._closed.is_set):
                self._counter.add(shards=int(not entry.where.endswith(".index")))
            self._sleep(0)
        except OSError as error:
            raise NoRoom(f"data.cache = {self.cache.folder} cannot be written ({error.strerror})") from error

    def _patience(self, wait_s: float) -> Patience:
        return Patience(wait_s, "data.wait_seconds", sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        """A pause that ends, with an error, when the supply is closed."""
        if self._closed.wait(seconds):
            raise DataError("the run ends")

    def _later(self, wanted: Entry) -> Later:
        """How many steps after the wanted entry another one is needed; infinite where this run never does."""
        needs: dict[str, int] = {}
        for need in self._plan.upcoming(self._step):
            needs.setdefault(self._entries[need.split][need.shard].sha256, need.begin)
        when = max(needs.get(wanted.sha256, self._step), self._step)
        return lambda sha256: needs[sha256] - when if sha256 in needs else float("inf")

    # -- ahead of them -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Once the first index is here: the first batch needs that first, and would share the line with shards."""
        with self._turn:
            if self._began is not None:
                return
            self._began = time.monotonic()
        if self._threads:
            self._news(f"streamed shards are kept in {self.cache}")
        for thread in self._threads:
            thread.start()

    def _lead(self) -> None:
        """One of the fetching threads."""
        while not self._closed.is_set():
            try:
                if entry := self._claimed():
                    self._ahead(entry)
                    continue
            except Exception as error:  # it must not end without a word: nobody would fetch ahead any more
                self._news(f"fetching ahead failed: {type(error).__name__}: {error}")
            self._closed.wait(LOOK_S)

    def _claimed(self) -> Entry | None:
        """The next entry that is neither here nor on its way."""
        with self._turn:
            now = time.monotonic()
            if now < self._complete_until:
                return None
            here = self.cache.present()
            for need in self._plan.upcoming(self._step):
                entry = self._entries[need.split][need.shard]
                waits = self._failed.get(entry.sha256, (0.0,))[0] > now or entry.sha256 in self._underway
                if is_url(entry.where) and entry.sha256 not in here and not waits:
                    self._underway.add(entry.sha256)
                    return entry
            self._complete_until = now + LOOK_S
        return None

    def _ahead(self, entry: Entry) -> None:
        """Fetches before anybody needs it. A failure is kept: who needs the shard tries again, or says it."""
        try:
            self._fetch(entry, min(AHEAD_S, self._how.wait_s))
            self._failed.pop(entry.sha256, None)
            self._tell()
        except NoRoom as full:
            self._failed[entry.sha256] = (time.monotonic() + LOOK_S, full)
        except (StoreError, DataError) as error:
            passes = isinstance(error, StoreError) and error.passes
            self._failed[entry.sha256] = (time.monotonic() + LOOK_S if passes else FOR_GOOD, error)
        finally:
            with self._turn:
                self._underway.discard(entry.sha256)

    def _tell(self) -> None:
        """How far it is, of what this epoch and the next one need."""
        entries = [self._entries[need.split][need.shard] for need in self._plan.upcoming(self._step)]
        wanted, here = {entry.sha256: entry.bytes for entry in entries}, self.cache.present()
        left = [size for sha256, size in wanted.items() if sha256 not in here]
        rate = self._counter.total.shard_bytes / max(time.monotonic() - (self._began or 0.0), 1e-9)
        self._news(
            f"{len(wanted) - len(left):,} of {len(wanted):,} shards are here, {rate / 1e6:,.0f} MB/s, "
            f"{sum(left) / max(rate, 1):,.0f} s left for the others",
            "progress",
        )


FOR_GOOD = float("inf")


@dataclass(frozen=True)
class _Shelf:
    """The entries of one split, by the numbers of their shards."""

    supply: Supply
    entries: Sequence[Entry]

    def open(self, shard: int) -> OpenFile | None:
        return self.supply.open(self.entries[shard])

    def bring(self, shard: int) -> bool:
        return self.supply.bring(self.entries[shard])

    def damaged(self, shard: int, file: OpenFile) -> bool:
        return self.supply.damaged(self.entries[shard], file)
