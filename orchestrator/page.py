"""A run's page in MLflow: what came out, in words, a table and a picture; where its data, code and checkpoints are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from orchestrator.config import RunConfig, flatten
from orchestrator.figures import COLOURS, markdown_lines, open_frame, save, short
from orchestrator.plan import Plan
from orchestrator.progress import clock
from orchestrator.state.records import Result
from orchestrator.tracking import RUN_ID, Tracker
from pipelines.dataset import Dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT = 7900  # characters of a description: MLflow takes 8000, and RUN_ID is longer once it is filled in
REASON = 500  # characters of one
CURVES, CLASSES = "curves", "per_class.json"
WORST = 5  # classes that are named on the page
NAME = 60  # characters of a class name there
# Settings that everyone asks for first.
KEY = ("model.shortcut", "data.lanes", "train.global_batch", "optim.lr", "optim.schedule", "optim.weight_decay",
       "train.seed", "train.precision", "train.reduce")  # fmt: skip
Row = dict[str, Any]


def publish(tracker: Tracker, config: RunConfig, plan: Plan, dataset: Dataset, result: Result,
            counts: Mapping[str, Any], tags: Mapping[str, str], say: Callable[[str], None], *,
            child: bool) -> None:  # fmt: skip
    """All that a run's page has besides its curves. To be called once the result is known, also of a run that failed.

    counts: images and right of each class in the last evaluation, as Ear.classes has them; may be empty. tags: what
    provenance.tags says, and Ray's job. child: of a study or a sweep, whose own page has the picture. Raises nothing: a
    run has not failed because its page has; say hears why.
    """
    if config.tracking.uri == "off":
        return
    try:
        _publish(tracker, config, plan, dataset, result, counts, tags, child)
    except Exception as error:
        say(f"the run's page in MLflow could not be written ({type(error).__name__}: {error}); please report it")


def _publish(tracker: Tracker, config: RunConfig, plan: Plan, dataset: Dataset, result: Result,
             counts: Mapping[str, Any], tags: Mapping[str, str], child: bool) -> None:  # fmt: skip
    rows = class_rows(dataset.classes, counts["images"], counts["right"]) if counts else []
    pictures = {} if child or not result.curve else figure(result.curve)
    for kind, content in pictures.items():
        tracker.file(content, f"{CURVES}.{kind}")
    if rows:
        tracker.table(rows, CLASSES)
    tracker.tags(_tags(config, result))
    tracker.note(description(config, plan, dataset, result, rows, tags, picture=bool(pictures)))


def description(config: RunConfig, plan: Plan, dataset: Dataset, result: Result, rows: Sequence[Row],
                tags: Mapping[str, str], *, picture: bool) -> str:  # fmt: skip
    """Markdown, the result first: MLflow shows three lines until it is unfolded. At most LIMIT characters."""
    return within(LIMIT, [
        headline(config, plan, result),
        "\n".join(_table(plan, result)),
        *([image(f"{CURVES}.svg", "Loss and top-1 by epoch")] if picture else []),
        "\n".join(_facts(config, plan, dataset, result, tags)),
        *(["\n".join(_worst(rows))] if rows else []),
        _settings(config),
    ])  # fmt: skip


def headline(config: RunConfig, plan: Plan, result: Result) -> str:
    """The result in one line.

    '**Top-1 75.32%, top-5 92.51%** of 50,000 validation images: resnet-50 on imagenet, 90 of 90 epochs in 9:03:20'
    """
    arch = config.model.arch(plan.classes)
    scored = result.top1 is not None and result.top5 is not None
    score = f"top-1 {_percent(result.top1)}, top-5 {_percent(result.top5)}" if scored else "not evaluated"
    of = f" of {result.val_samples:,} validation images" if scored else ""
    way = (
        f"{arch.name} on {_code(config.data.name)}, {result.epochs} of {plan.epochs} epochs in {clock(result.seconds)}"
    )
    if result.status == "finished":
        return f"**{score.capitalize()}**{of}: {way}"
    reason = f": {_code(result.reason[:REASON])}" if result.reason else ""
    goes_on = "; the same name goes on with it" if result.resumable else ""
    return f"**{result.status.capitalize()}**{reason}{goes_on}\n\n**{score.capitalize()}**{of}: {way}"


def class_rows(names: Sequence[str], images: Sequence[int], right: Sequence[int]) -> list[Row]:
    """A row for each class, the worst first: label, class, images, right, top1 (share; None without images).

    Of equal shares the class with more images comes first, and then the one with the smaller label.
    """
    rows = [{"label": label, "class": name, "images": count, "right": good, "top1": good / count if count else None}
            for label, (name, count, good) in enumerate(zip(names, images, right, strict=True))]  # fmt: skip
    return sorted(rows, key=_badness)


def _badness(row: Row) -> tuple[float, int, int]:
    return (2.0 if row["top1"] is None else row["top1"], -row["images"], row["label"])


def figure(curve: Sequence[Mapping[str, float]]) -> dict[str, bytes]:
    """Loss, left, and top-1, right, by epoch, as {"svg": ..., "png": ...}: training thin, validation bold.

    Epochs that were not evaluated have no point on the bold lines. The same curve gives the same bytes.
    """
    from matplotlib.figure import Figure  # the object interface: no global state, no window

    drawn = Figure(figsize=(7.2, 2.9), layout="constrained")
    losses, shares = drawn.subplots(1, 2, sharex=True)
    for axes, name, scale in ((losses, "loss", 1.0), (shares, "top1", 100.0)):
        for kind, width in (("train", 0.9), ("val", 2.4)):
            known = {point["epoch"]: scale * point[f"{kind}_{name}"] for point in curve if f"{kind}_{name}" in point}
            axes.plot(list(known), list(known.values()), color=COLOURS[kind == "val"], linewidth=width, marker="o",
                      markersize=1.5 * width, label="validation" if kind == "val" else "training")  # fmt: skip
    _dress(losses, "loss (nats)")
    _dress(shares, "top-1 (%)")
    return save(drawn)


def _dress(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    open_frame(axes)


def image(name: str, words: str) -> str:
    """An artifact of the run, shown in its description: MLflow's pages let a picture of their own server through (seen
    in 3.17.2). The address is relative to the page, so that it holds behind a prefix and a password, too."""
    return f"![{words}]({_address(name)})"


def within(limit: int, blocks: Iterable[str]) -> str:
    """Blocks of Markdown, the first ones that fit."""
    text = ""
    for block in blocks:
        longer = f"{text}\n\n{block}" if text else block
        if len(longer) > limit:
            break
        text = longer
    return text


# -- parts ---------------------------------------------------------------------------------------------------------


def _table(plan: Plan, result: Result) -> list[str]:
    """One row: it is seen before the description is unfolded."""
    best = max((point for point in result.curve if "val_top1" in point), key=lambda p: p["val_top1"], default=None)
    cells = {
        "top-1": _percent(result.top1),
        "best (epoch)": f"{_percent(best['val_top1'])} ({best['epoch']:.0f})" if best else "",
        "top-5": _percent(result.top5),
        "validation loss": _number(result.loss),
        "training loss": _number(result.train_loss),
        "epochs": f"{result.epochs}/{plan.epochs}",
        "images/s": f"{result.images_per_second:,.0f}" if result.images_per_second else "",
        "restarts": str(result.restarts),
        "resizes": str(result.resizes),
    }
    return _spaced(list(cells), [list(cells.values())])


def _facts(config: RunConfig, plan: Plan, dataset: Dataset, result: Result, tags: Mapping[str, str]) -> list[str]:
    """What it was made of and where it lies, a line each."""
    arch, folder = config.model.arch(plan.classes), config.folder().rstrip("/")
    facts = {
        "Dataset": f"{_code(config.data.name)}, {plan.train_samples:,} training and {plan.val_samples:,} validation "
        f"images of {plan.classes:,} classes, digest {_code(dataset.digest)}, in {_code(dataset.place)}",
        "Net": f"{arch.name}: {short(plan.parameters)} parameters, {short(plan.multiply_adds)} multiply-adds an image",
        "Workers": str(result.world_size) if result.world_size else "",
        "Bad images": f"{len(result.bad_images)}, see {_code('bad_images.json')}" if result.bad_images else "",
        "Code": _origin(tags),
        "Ray": ", ".join(f"{word} {_code(tags[key])}" for word, key in RAY.items() if tags.get(key)),
        "Run": f"{_code(folder)}, its result in {_code('result.json')}",
        "Newest checkpoint": _code(f"{folder}/{result.checkpoint}") if result.checkpoint else "",
        "Best checkpoint": _code(f"{folder}/{result.best_checkpoint}") if result.best_checkpoint else "",
        "Weights": f"sha256 {_code(result.weights_sha256)}" if result.weights_sha256 else "",
    }
    return [f"- **{name}:** {fact}" for name, fact in facts.items() if fact]


RAY = {"job": "ray.job_id", "submission": "ray.submission_id"}
DIRTY = {"true": "with uncommitted changes", "false": "clean"}


def _origin(tags: Mapping[str, str]) -> str:
    """'commit `abc`, clean; package sha256 `def`'"""
    commit, package = tags.get("mlflow.source.git.commit"), tags.get("skiplane.package_sha256")
    state = DIRTY.get(tags.get("skiplane.git_dirty", ""), "whether with changes is not known")
    known = [f"commit {_code(commit)}, {state}"] if commit else []
    return "; ".join([*known, *([f"package sha256 {_code(package)}"] if package else [])])


def _worst(rows: Sequence[Row]) -> list[str]:
    """The classes that do worst."""
    shown = [[_code(row["class"][:NAME]), f"{row['right']:,} of {row['images']:,}", _percent(row["top1"])]
             for row in rows[:WORST] if row["images"]]  # fmt: skip
    return [f"Classes that do worst (all of them: [{CLASSES}]({_address(CLASSES)}), a table under Artifacts)", "",
            *_spaced(("class", "right", "top-1"), shown)]  # fmt: skip


def _spaced(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns stand apart: MLflow's pages leave nothing between them."""
    head, *rest = [[f"{cell}&emsp;" for cell in row] for row in (columns, *rows)]
    return markdown_lines(head, rest)


def _settings(config: RunConfig) -> str:
    """Those that everyone asks for."""
    values = flatten(config)
    return "Settings (all that decide the result are parameters of the run): " + ", ".join(
        f"{name} {_code(str(values[name]))}" for name in KEY
    )


def _tags(config: RunConfig, result: Result) -> dict[str, str]:
    """For searches, and for scripts."""
    folder = config.folder().rstrip("/")
    kept = {"skiplane.checkpoint": result.checkpoint, "skiplane.best_checkpoint": result.best_checkpoint}
    counts = {"skiplane.restarts": str(result.restarts), "skiplane.resizes": str(result.resizes)}
    return counts | {tag: f"{folder}/{name}" for tag, name in kept.items() if name}


def _address(name: str) -> str:
    return f"get-artifact?path={quote(name)}&run_uuid={RUN_ID}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _code(text: str) -> str:
    """Text that Markdown leaves alone, in a table too."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "/") + "`"
