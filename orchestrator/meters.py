"""What Prometheus may know of a run: every metric once, with its meaning. Ray puts `ray_` before each name.

Counters are made by the workers, one series a rank; gauges by the driver, one series a run. A counter stays on its
node's page when its run is over, until Ray ends there; a gauge is there while its driver lives, and 20 s longer.
So what says how a run is doing are gauges, those that only rise among them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "skiplane_"


@dataclass(frozen=True)
class Meter:
    """One metric. name: without the prefix; `_total` is a counter's. meaning: with the unit where it has one."""

    name: str
    meaning: str

    @property
    def counts(self) -> bool:
        """Whether it is a counter, and of each rank."""
        return self.name.endswith("_total")

    @property
    def full_name(self) -> str:
        """As Ray is told it."""
        return PREFIX + self.name

    @property
    def shown_name(self) -> str:
        """As a scrape reads it."""
        return f"ray_{self.full_name}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of ours; Ray adds the node's address, its session and the process."""
        return ("run", "rank") if self.counts else ("run",)


WORKER = (
    Meter("images_total", "Training images in the steps that this rank did, repeated steps included"),
    Meter("steps_total", "Steps that this rank did, repeated ones included; each rank does all of its group's"),
    Meter("step_seconds_total", "Seconds in steps; on a GPU until the step was queued, which waits for earlier ones"),
    Meter("data_wait_seconds_total", "Seconds that training waited for its next batch"),
    Meter("evaluation_seconds_total", "Seconds in evaluations"),
    Meter("checkpoint_seconds_total", "Seconds that training stood while its state was copied"),
    Meter("bad_images_total", "Times a bad image was replaced in this rank's batches"),
    Meter("cache_hits_total", "Images read from a shard that was in the node's cache"),
    Meter("cache_misses_total", "Images whose shard was not in the cache yet: read by range, or waited for"),
    Meter("fetched_shards_total", "Shards that this rank fetched whole; one rank a node fetches ahead for all"),
    Meter("fetched_bytes_total", "Bytes that came over the network: of shards, indexes and ranges"),
    Meter("fetch_retries_total", "Requests to the dataset's store that failed and were made again"),
)  # fmt: skip

RUN = (
    Meter("workers", "Workers of the run's group, which starts or trains; 0 between groups"),
    Meter("restarts", "Restarts after a death, since this submission began"),
    Meter("resizes", "Groups that went on with another number of workers"),
    Meter("steps_repeated", "Steps that were done again because a group died"),
    Meter("goodput_ratio", "Share of the seconds since this submission began that went into steps which were not "
                           "repeated, on rank 0; waiting for data, evaluations, saves and starts are not in it"),
    Meter("steps_done", "Global steps of the run, as far as its driver heard"),
    Meter("steps_planned", "Global steps that the run has in all"),
    Meter("epochs_done", "The same in epochs, with a fraction"),
    Meter("left_seconds", "Seconds until the last step at the present speed"),
    Meter("training_loss", "Mean loss of the last tracking.log_steps steps, in nat"),
    Meter("training_top1_ratio", "Share of their images that were classified right"),
    Meter("validation_top1_ratio", "The same in the newest evaluation"),
)  # fmt: skip


def by_name(meters: Iterable[Meter]) -> dict[str, Meter]:
    """Name -> meter."""
    return {meter.name: meter for meter in meters}
