"""A study: plain and residual nets trained alike, laid beside the paper's table, with a verdict that is computed.

Its runs live in `<storage>/<study>/<run>/`, its own result beside them. Runs that have finished are not trained again,
so a study goes on where it was, and grows when nets or seeds are added.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from orchestrator import figures, page, provenance
from orchestrator.config import RunConfig
from orchestrator.settings import sentences
from orchestrator.state.lease import lease
from orchestrator.state.records import Result
from orchestrator.state.storage import Storage
from orchestrator.tracking import Others, Place, Tracker, left_line, open_tracker, study_view
from orchestrator.verdict import DEGRADATION_NATS, Row, Verdict, verdict
from pipelines.errors import ClusterError, ConfigError, TrainingError

DEFAULT_NETS = "plain-18,plain-34,resnet-18,resnet-34"
__all__ = ["DEFAULT_NETS", "DEGRADATION_NATS", "Row", "Study", "Verdict", "children", "parse_nets", "run", "verdict"]
Say = Callable[[str], None]


class Train(Protocol):
    """supervise.run: trains a run to its end, or returns at once where it has finished."""

    def __call__(self, config: RunConfig, *, child: bool, say: Say, tags: Mapping[str, str]) -> Result: ...


@dataclass(frozen=True)
class Study:
    """result.json of a study."""

    status: str
    nets: list[Row]
    degradation: bool | None
    residual_converges_faster: bool | None
    figure: str  # SVG; a PNG lies beside it
    mlflow_url: str | None  # opens the curves side by side
    verdict: str  # in words, with the thresholds


def parse_nets(text: str) -> list[tuple[str | None, int]]:
    """'plain-18,resnet-34' -> [("none", 18), (None, 34)]; None is the shortcut of the settings. Raises ConfigError."""
    nets: list[tuple[str | None, int]] = []
    for item in text.split(","):
        found = re.fullmatch(r"(plain|resnet)-(\d{1,4})", item.strip())
        if found is None:
            raise ConfigError(
                f"--nets: '{item.strip()}' is no net; use plain-DEPTH or resnet-DEPTH, such as {DEFAULT_NETS}"
            )
        net = ("none" if found[1] == "plain" else None, int(found[2]))
        if net in nets:
            raise ConfigError(f"--nets: '{item.strip()}' is there twice; use --seeds to train it more than once")
        nets.append(net)
    return nets


def children(config: RunConfig, nets: Sequence[tuple[str | None, int]], seeds: int) -> list[RunConfig]:
    """The settings of every run, seed by seed. Raises ConfigError for a net that does not exist."""
    if not config.name:
        raise ConfigError("name is not set; give the study a --name: the same name goes on with the same study")
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; at least 1 is needed")
    if config.model.shortcut == "none" and any(shortcut is None for shortcut, _ in nets):
        raise ConfigError("model.shortcut is none, and --nets has residual nets; set --model.shortcut to A, B or C")
    storage = config.folder()
    try:
        return [
            config.replace({
                "name": f"{'plain' if shortcut else 'resnet'}-{depth}-s{seed}", "cluster.storage": storage,
                "model.depth": depth, "model.shortcut": shortcut or config.model.shortcut, "train.seed": seed,
            })
            for seed in range(config.train.seed, config.train.seed + seeds)
            for shortcut, depth in nets
        ]  # fmt: skip
    except ValidationError as error:
        raise ConfigError(f"--nets: {sentences(error)}") from error


def run(config: RunConfig, nets: Sequence[tuple[str | None, int]], seeds: int, *, say: Say, train: Train,
        cluster: Callable[[], AbstractContextManager[None]],
        stops: tuple[type[BaseException], ...] = (KeyboardInterrupt,)) -> Study:  # fmt: skip
    """Trains what is not trained yet, one run after the other, then compares.

    `train` is supervise.run; `cluster` is entered once around all runs; `stops` is what `train` raises when it was
    asked to stop. All that it raises is raised on, and the runs so far are kept. A study that has finished is shown
    again, and neither cluster nor tracking server is contacted.
    """
    runs, storage = children(config, nets, seeds), Storage(config.folder())
    for name, kind in (("run.json", "run"), ("sweep.json", "sweep")):
        if storage.read(name) is not None:
            raise ConfigError(f"name '{config.name}' is a {kind} in {storage.place}; use another --name")
    before = _result(storage)
    if before is not None and {(row["name"], row["seed"]) for row in before["nets"]} == {_key(child) for child in runs}:
        # Each returns at once; a name that is used with other settings is refused.
        rows = [_row(child, train(child, child=True, say=_nothing, tags={})) for child in runs]
        say(f"study {config.name} is finished; another --name trains anew (make demo NAME=other)")
        return _show(storage, rows, before["mlflow_url"], say)
    with lease(storage, config.name, say) as held:
        tracker = _open(config, Place(storage, held.number), runs)
        return _study(config, runs, storage, tracker, say=say, train=train, cluster=cluster, stops=stops)


def _study(config: RunConfig, runs: Sequence[RunConfig], storage: Storage, tracker: Tracker, *, say: Say, train: Train,
           cluster: Callable[[], AbstractContextManager[None]],
           stops: tuple[type[BaseException], ...]) -> Study:  # fmt: skip
    """With the study held, and its run open."""
    status = "FAILED"
    try:
        with cluster():
            rows = [_train(child, f"[{number}/{len(runs)}]", config.name, train, say)
                    for number, child in enumerate(runs, 1)]  # fmt: skip
        link = tracker.view(study_view(config.name, tracker.run_id, len(rows))) if tracker.run_id else None
        study = _show(storage, rows, link, say)
        _track(tracker, study)
        status = "FINISHED"
    except stops:
        status = "KILLED"
        raise
    finally:
        own, folders = tracker.finish(status), (Storage(child.folder()) for child in runs)
        with suppress(ClusterError):  # what the storage does not show now is sent by hand
            for shipped in (own, Others(config.tracking.uri).end(folders, config.tracking.wait_seconds)):
                if shipped.left or shipped.refused:
                    say(left_line(shipped, storage.place, config.tracking.uri))
    return study


def _train(child: RunConfig, place: str, study: str, train: Train, say: Say) -> Row:
    say(f"{place} {child.name}")
    return _row(child, train(child, child=True, say=say, tags={"skiplane.study": study}))


def _row(child: RunConfig, done: Result) -> Row:
    if done.top1 is None or done.train_loss is None or done.train_loss_mean is None:
        raise TrainingError(f"run {child.name} ended as {done.status} without a loss and an accuracy; look at its "
                            f"result.json in {child.folder()}")  # fmt: skip
    name, seed = _key(child)
    return Row(
        name=name, seed=seed, depth=child.model.depth, shortcut=child.model.shortcut, train_loss=done.train_loss,
        val_error=100.0 * (1.0 - done.top1), epochs=done.epochs, seconds=done.seconds, parameters=done.parameters,
        multiply_adds=done.multiply_adds, weights_sha256=done.weights_sha256, data_digest=done.data_digest,
        mlflow_run_id=done.mlflow_run_id, train_loss_mean=done.train_loss_mean, curve=done.curve)  # fmt: skip


def _show(storage: Storage, rows: list[Row], link: str | None, say: Say) -> Study:
    """Judges, draws, writes (result.json last) and prints."""
    judged = verdict(rows)
    for kind, content in figures.figure4(rows).items():
        storage.write(f"figure4.{kind}", content)
    study = Study("finished", rows, judged.degradation, judged.residual_converges_faster,
                  f"{storage.place}/figure4.svg", link, judged.text)  # fmt: skip
    storage.write("result.json", json.dumps(asdict(study), indent=1).encode())
    say("\n" + figures.table_text(rows))
    say(f"\n{judged.text}\n\nFigure: {study.figure} (and .png)")
    say(f"Curves: {link or 'no MLflow server to open them in: see tracking.uri'}")
    return study


def _track(tracker: Tracker, study: Study) -> None:
    """The parent run: verdict as tags, table as its description, figure and result as files."""
    tracker.tags({"skiplane.degradation": str(study.degradation).lower(),
                  "skiplane.residual_converges_faster": str(study.residual_converges_faster).lower()})  # fmt: skip
    link = [f"[Curves side by side]({study.mlflow_url})"] if study.mlflow_url else []
    picture = page.image("figure4.svg", "Training and validation error by epoch")
    tracker.note(page.within(page.LIMIT, [study.verdict, *link, picture, figures.table_markdown(study.nets)]))
    for kind, content in figures.figure4(study.nets).items():
        tracker.file(content, f"figure4.{kind}")
    tracker.file(json.dumps(asdict(study), indent=1).encode(), "result.json")


def _open(config: RunConfig, place: Place, runs: Sequence[RunConfig]) -> Tracker:
    """The parent run in MLflow. study.json says that the name is a study's."""
    noted = _read(place.storage, "study.json") or {"id": uuid.uuid4().hex}
    tracker = open_tracker(
        place, config.tracking.uri, config.tracking.experiment, config.name, id=noted["id"],
        params={"runs": ", ".join(child.name for child in runs)},
        tags=provenance.tags() | {"skiplane.kind": "study", "skiplane.study": config.name},
        wait_s=config.tracking.wait_seconds)  # fmt: skip
    place.storage.write("study.json", json.dumps({**noted, "mlflow_run_id": tracker.run_id}).encode())
    return tracker


def _result(storage: Storage) -> dict[str, Any] | None:
    return _read(storage, "result.json")


def _read(storage: Storage, name: str) -> dict[str, Any] | None:
    """A record of the study; None where there is none, or a torn one."""
    try:
        found = json.loads(storage.read(name) or b"null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _key(child: RunConfig) -> tuple[str, int]:
    """("plain-18", 0): which net, and which seed."""
    return child.name.rpartition("-s")[0], child.train.seed


def _nothing(_: str) -> None:
    """Says nothing."""
