"""Where a worker's samples come from: files, or this node's supply where the dataset is streamed."""

import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from orchestrator.config import RunConfig
from orchestrator.context import Context, Record
from orchestrator.plan import Plan, eval_ids, lanes_of
from pipelines.dataset import Dataset
from pipelines.quarantine import BadSample
from pipelines.reader import Reader
from pipelines.remote.cache import Cache
from pipelines.remote.needs import InOrder, Needs, shards_of
from pipelines.remote.news import Say
from pipelines.remote.supply import How, Supply
from pipelines.remote.transfer import Fetched


class Feed:
    """Readers of some splits, and what brings them their shards: nothing where these are files. Raises DataError."""

    def __init__(self, dataset: Dataset, supply: Supply | None, splits: Sequence[str], threads: int) -> None:
        self._supply, self._told = supply, Fetched()
        self.readers: dict[str, Reader] = {}
        try:
            for name in splits:
                self.readers[name] = self._reader(dataset, name, threads)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def at(self, step: int) -> None:
        """Where training is (a global step), or a pass over one split (a sample)."""
        if self._supply:
            self._supply.at(step)

    def news(self) -> list[Record]:
        """What this worker fetched since the last call, as a record; none where it was nothing."""
        if not self._supply or self._supply.fetched == self._told:
            return []
        before, self._told = self._told, self._supply.fetched
        return [fetched_record(self._told - before)]

    def counts(self) -> dict[str, int]:
        """This worker's totals, by their names in meters.WORKER; none where the samples are in files."""
        if not self._supply:
            return {}
        fetched, reads = self._supply.fetched, self._supply.reads
        return {
            "cache_hits_total": reads.hits,
            "cache_misses_total": reads.misses,
            "fetched_shards_total": fetched.shards,
            "fetched_bytes_total": fetched.shard_bytes + fetched.sample_bytes,
            "fetch_retries_total": fetched.retries,
        }

    def cancel(self) -> None:
        """Ends whatever waits for data."""
        if self._supply:
            self._supply.cancel()

    def close(self) -> None:
        """Leaves no thread and no open file."""
        for reader in self.readers.values():
            reader.close()
        if self._supply:
            self._supply.close()

    def _reader(self, dataset: Dataset, split: str, threads: int) -> Reader:
        return self._supply.reader(split, threads) if self._supply else Reader(dataset, split, threads)


def training_feed(config: RunConfig, dataset: Dataset, plan: Plan, context: Context, start: int) -> Feed:
    """Of a worker that trains from global step `start` on. Raises ConfigError for the cache, DataError."""
    supply = None
    if dataset.streamed:
        how = How(context.rank == context.node_ranks[0], config.data.fetches, config.data.wait_seconds)
        needs = _needs(config, dataset, plan, context)
        supply = Supply(dataset, open_cache(config), needs, how, _say(context), start)
    return Feed(dataset, supply, ("train", "val"), threads_of(config))


def scoring_feed(config: RunConfig, dataset: Dataset, split: str, say: Say) -> Feed:
    """Of one process that reads a split once, in order. Raises ConfigError for the cache, DataError."""
    supply = None
    if dataset.streamed:
        how = How(threads=config.data.fetches, wait_s=config.data.wait_seconds)
        supply = Supply(dataset, open_cache(config), InOrder(split, dataset.splits[split].starts), how, say)
    return Feed(dataset, supply, (split,), threads_of(config))


def threads_of(config: RunConfig) -> int:
    """Of a worker, for reading and for decoding."""
    return config.data.threads or config.cluster.cpus_per_worker


def open_cache(config: RunConfig) -> Cache:
    """This node's cache. Raises ConfigError."""
    data = config.data
    return Cache(Path(data.cache), int(data.cache_gb * 1e9), in_memory=data.cache_in_memory)


def fetched_record(fetched: Fetched) -> Record:
    """Counts as a record."""
    return {"kind": "fetched", **fetched.to_dict()}


def bad_record(bad: BadSample, split: str) -> Record:
    """A bad sample as a record: of each only the first, from any thread; the driver drops what it knows."""
    return {"kind": "bad", "split": split, **asdict(bad)}


def _needs(config: RunConfig, dataset: Dataset, plan: Plan, context: Context) -> Needs:
    """Of all workers on this node."""
    world, ranks, every = context.world_size, context.node_ranks, config.train.eval_epochs
    samples = range(
        eval_ids(ranks[0], world, plan.val_samples).start, eval_ids(ranks[-1], world, plan.val_samples).stop
    )
    return Needs(
        plan.order,
        lanes=[lane for rank in ranks for lane in lanes_of(rank, world, config.data.lanes)],
        val=shards_of(dataset.splits["val"].starts, samples),
        evaluates=lambda epoch: epoch + 1 == plan.epochs or (epoch + 1) % every == 0,
        epochs=plan.epochs,
    )


def _say(context: Context) -> Say:
    host = socket.gethostname()
    return lambda text: context.send([{"kind": "say", "text": f"data on {host}: {text}"}])
