"""What the driver does with the records that come from the workers: a line for people, points for the tracker."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from orchestrator.config import RunConfig
from orchestrator.context import Record
from orchestrator.nodes import Newest, curves, worst
from orchestrator.plan import Plan, in_bytes
from orchestrator.state.register import NAME, BadImage, Register
from orchestrator.tracking import Metric, Tracker

# Record field -> metric name.
TRAINING = {
    "loss": "train/loss",
    "top1": "train/top1",
    "top5": "train/top5",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "images_per_s": "perf/images_per_s",
    "data_wait": "perf/data_wait",
    "step_s": "perf/step_s",
}
STALE = 3  # sampling intervals after which a node is taken to have left
EPOCH = {"val_loss": "val/loss", "val_top1": "val/top1", "val_top5": "val/top5"}


Say = Callable[[str], None]
Show = Callable[[Record], None]  # sees the records of kind stage, progress, epoch and recalled


class Lines:
    """How far a run is, for people: a line for each stage and each epoch, and one of progress now and then."""

    def __init__(self, config: RunConfig, plan: Plan, say: Say) -> None:
        self._every_s, self._epochs, self._say = config.tracking.progress_seconds, plan.epochs, say
        self._printed = 0.0

    def __call__(self, record: Record) -> None:
        """Says it, or not yet."""
        if record["kind"] == "epoch":
            self._say(epoch_line(record, self._epochs))
        elif record["kind"] == "stage":
            self._say(record["text"])
        elif record["kind"] == "progress" and time.monotonic() - self._printed >= self._every_s:
            self._printed = time.monotonic()
            self._say(progress_line(record))


class Ear:
    """Hears records in the driver: all go to the tracker, how far the run is to `show`."""

    def __init__(
        self, config: RunConfig, plan: Plan, register: Register, tracker: Tracker, say: Say, show: Show
    ) -> None:
        self._config, self._plan, self._register, self._tracker, self._say = config, plan, register, tracker, say
        self._show = show
        self.reached = 0  # global steps that some group has done, as far as was heard
        self._kinds = {
            "at": self._reach,
            "progress": self._progress,
            "epoch": self._epoch,
            "again": self._again,
            "say": self._text,
            "decode": self._decode,
            "fetched": self._fetch,
            "system": self._sample,
            "classes": self._count,
        }
        self.classes: Record = {}  # images and right of each class in the run's last evaluation; empty before it
        self._nodes, self._worst = Newest(STALE * config.tracking.system_seconds), ""
        self.fetched: Counter[str] = Counter()  # fields of pipelines.remote.transfer.Fetched, over all workers
        if register.images:
            self._say(f"bad images known from before: {len(register.images)}, see {register.place}")
            self._show_bad()

    def hear(self, records: list[Record]) -> None:
        """All records of one look into the mailbox. Raises DataError where too many images are bad."""
        for record in records:
            if act := self._kinds.get(record["kind"]):
                act(record)
        self._bad([_bad_image(record) for record in records if record["kind"] == "bad"])

    def stage(self, text: str) -> None:
        """What the run does now."""
        self._show({"kind": "stage", "text": text})

    def recall(self, curve: Sequence[Mapping[str, float]]) -> None:
        """The epochs that a group goes on after; they were logged when they were done."""
        for point in curve:
            self._show({"kind": "recalled", **point})

    def _reach(self, record: Record) -> None:
        self.reached = max(self.reached, record["global_step"])

    def _progress(self, record: Record) -> None:
        self._reach(record)
        self._log(record, curves(self._nodes.news()))
        self._show(record)

    def _epoch(self, record: Record) -> None:
        self._log(record)
        self._show_worst()
        self._show(record)

    def _again(self, record: Record) -> None:
        """What a checkpoint brings of the time before it; all that was heard then is left out by the tracker."""
        for told in record["records"]:
            self._log(told)

    def _sample(self, record: Record) -> None:
        """Shown with the next point of the training curves."""
        self._nodes.add(record["node"], record["values"])

    def _show_worst(self) -> None:
        nodes = worst(self._nodes.now())
        if nodes not in ("", self._worst):
            self._tracker.tags({"skiplane.worst_nodes": nodes})
            self._worst = nodes

    def _count(self, record: Record) -> None:
        self.classes = record

    def _bad(self, met: list[BadImage]) -> None:
        """Each image is said once, and the table shown anew once a look: before the run may end because of them."""
        if fresh := self._register.add(met):
            for image in fresh:
                self._say(f"bad image in {image.split}: {image}")
            self._show_bad()
        self._register.check(met)

    def _show_bad(self) -> None:
        rows = self._register.to_list()
        self._tracker.table(rows, NAME)
        self._tracker.tags({"skiplane.bad_images": str(len(rows))})

    def _decode(self, record: Record) -> None:
        wanted = self._config.data.decode
        self.stage(f"training on {record['device']}, JPEGs are decoded on {record['where']} (data.decode = {wanted})")
        self._tracker.tags({"skiplane.decode": record["where"], "skiplane.device": record["device"]})

    def _fetch(self, record: Record) -> None:
        self.fetched.update({name: count for name, count in record.items() if name != "kind"})

    def _text(self, record: Record) -> None:
        self._say(record["text"])

    def _log(self, record: Record, more: Mapping[str, float] = MappingProxyType({})) -> None:
        step, when = record["global_step"], record["time_ms"]
        values = {**points(record, self._plan.steps_per_epoch), **more}
        self._tracker.metrics([Metric(name, value, step, when) for name, value in values.items()])


def points(record: Record, steps_per_epoch: int) -> dict[str, float]:
    """The values of the curves that a progress or an epoch record has."""
    if record["kind"] == "progress":
        values = {name: record[key] for key, name in TRAINING.items()}
        return values | {"train/epoch": record["global_step"] / steps_per_epoch}
    values = {name: record[key] for key, name in EPOCH.items() if key in record}
    if "val_top1" in record:
        values["val/top1_best"] = record["val_top1_best"]
        values["val/error"] = 100.0 * (1.0 - record["val_top1"])
    return values | {"train/epoch_loss": record["train_loss"]}


def _bad_image(record: Record) -> BadImage:
    return BadImage(**{name: value for name, value in record.items() if name != "kind"})


def progress_line(record: Record) -> str:
    """One line of progress for a log."""
    return (
        f"epoch {record['epoch'] + 1}/{record['epochs']} step {record['step']}/{record['steps_per_epoch']}  "
        f"loss {record['loss']:.4f}  top-1 {record['top1']:.1%}  {record['images_per_s']:,.0f} img/s  "
        f"waiting for data {record['data_wait']:.0%}  {clock(record['left_s'])} left"
    )


def epoch_line(record: Record, epochs: int) -> str:
    """One line for a finished epoch."""
    line = f"epoch {record['epoch']}/{epochs} done  train loss {record['train_loss']:.4f}"
    if "val_top1" in record:
        line += f"  val loss {record['val_loss']:.4f}  val top-1 {record['val_top1']:.2%}"
    return line


def fetched_line(fetched: Mapping[str, int]) -> str:
    """What came over the network, for a person."""
    line = f"{fetched['shards']:,} shards, {in_bytes(fetched['shard_bytes'])}"
    if fetched["samples"]:
        line += f"; {fetched['samples']:,} images before their shard, {in_bytes(fetched['sample_bytes'])}"
    return line + (f"; {fetched['retries']:,} requests made again" if fetched["retries"] else "")


def clock(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
