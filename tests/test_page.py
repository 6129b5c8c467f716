"""A run's page: what is said, in which order, and what a name or an error may not break."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from orchestrator import page
from orchestrator.config import RunConfig
from orchestrator.state.records import Result
from orchestrator.tracking import NullTracker

CONFIG = RunConfig.model_validate({"name": "a", "cluster": {"storage": "/runs/"}})
PLAN = SimpleNamespace(classes=3, train_samples=1_281_167, val_samples=50_000, epochs=90, parameters=25_557_032,
                       multiply_adds=4_089_184_256)  # fmt: skip
DATASET = SimpleNamespace(place="s3://data/imagenet", digest="d" * 64, classes=("cat", "dog", "cow"))
CURVE = [{"epoch": e, "train_loss": 3 / e, "train_top1": 1 - 0.9 / e, "val_loss": 4 / e, "val_top1": 0.8 - 0.5 / e,
          "val_top5": 0.9} for e in range(1, 7)]  # fmt: skip
CURVE[3]["val_top1"] = 0.7925  # the best, before the last
del CURVE[4]["val_top1"], CURVE[4]["val_loss"]  # an epoch that was not evaluated
RESULT = Result(
    name="a", status="finished", epochs=90, steps=450_000, top1=0.7532, top5=0.9251, val_samples=50_000, loss=0.98765,
    train_loss=1.2345, weights_sha256="e" * 64, dataset_digest="d" * 64, world_size=64, restarts=2, resizes=1,
    images_per_second=25_000.4, seconds=32_600, parameters=25_557_032, multiply_adds=4_089_184_256,
    checkpoint="checkpoints/step-000450000-0001.001", best_checkpoint="checkpoints/step-000020000-0001.001",
    curve=CURVE, bad_images=[{}, {}],
)  # fmt: skip
TAGS = {"mlflow.source.git.commit": "c0ffee", "skiplane.git_dirty": "true", "skiplane.package_sha256": "5ec",
        "ray.job_id": "07000000", "ray.submission_id": "raysubmit_x"}  # fmt: skip
COUNTS = {"kind": "classes", "images": [10, 10, 20], "right": [9, 3, 8]}


def rows(counts=COUNTS):
    return page.class_rows(DATASET.classes, counts["images"], counts["right"])


def text(result=RESULT, tags=TAGS, table=(), picture=True, **of_dataset):
    dataset = SimpleNamespace(**{**vars(DATASET), **of_dataset})
    return page.description(CONFIG, PLAN, dataset, result, table, tags, picture=picture)


def cells(markdown):
    """{title: cell} of the first table."""
    head, _, values = [line for line in markdown.splitlines() if line.startswith("|")][:3]
    return dict(zip(unspaced(head), unspaced(values), strict=True))


def unspaced(line):
    """The cells of a line of a table."""
    return [cell.strip().removesuffix("&emsp;") for cell in line.strip("|").split("|")]


# -- the description ---------------------------------------------------------------------------------------------------


def test_it_leads_with_the_result_then_table_then_picture():
    lines = text().splitlines()
    assert lines[0] == ("**Top-1 75.32%, top-5 92.51%** of 50,000 validation images: resnet-50 on `imagenet`, "
                        "90 of 90 epochs in 9:03:20")  # fmt: skip
    assert (lines[1], lines[5]) == ("", "")
    assert lines[2].startswith("| top-1&emsp; |")
    assert lines[6] == "![Loss and top-1 by epoch](get-artifact?path=curves.svg&run_uuid={run_id})"


def test_the_table_has_the_run_in_one_row():
    assert cells(text()) == {
        "top-1": "75.32%",
        "best (epoch)": "79.25% (4)",
        "top-5": "92.51%",
        "validation loss": "0.9877",
        "training loss": "1.2345",
        "epochs": "90/90",
        "images/s": "25,000",
        "restarts": "2",
        "resizes": "1",
    }


@pytest.mark.parametrize(
    "line",
    [
        "- **Dataset:** `imagenet`, 1,281,167 training and 50,000 validation images of 3 classes, digest "
        f"`{'d' * 64}`, in `s3://data/imagenet`",
        "- **Net:** resnet-50: 25.6 M parameters, 4.09 G multiply-adds an image",
        "- **Code:** commit `c0ffee`, with uncommitted changes; package sha256 `5ec`",
        "- **Workers:** 64",
        "- **Bad images:** 2, see `bad_images.json`",
        "- **Ray:** job `07000000`, submission `raysubmit_x`",
        "- **Run:** `/runs/a`, its result in `result.json`",
        "- **Newest checkpoint:** `/runs/a/checkpoints/step-000450000-0001.001`",
        "- **Best checkpoint:** `/runs/a/checkpoints/step-000020000-0001.001`",
        f"- **Weights:** sha256 `{'e' * 64}`",
    ],
)
def test_what_it_was_made_of_and_where_it_lies(line):
    assert line in text().splitlines()


@pytest.mark.parametrize(
    ("tags", "line"),
    [
        ({"mlflow.source.git.commit": "c0ffee", "skiplane.git_dirty": "false"}, "- **Code:** commit `c0ffee`, clean"),
        ({"mlflow.source.git.commit": "c"}, "- **Code:** commit `c`, whether with changes is not known"),
        ({"skiplane.package_sha256": "5ec"}, "- **Code:** package sha256 `5ec`"),
    ],
)
def test_of_the_code_what_is_known(tags, line):
    lines = text(tags=tags).splitlines()
    assert line in lines
    assert not [other for other in lines if other.startswith("- **Ray:**")]


def test_a_run_that_failed_says_so_first_and_why():
    failed = replace(RESULT, status="failed", epochs=12, reason="training diverged at step 7: loss nan |\n `x`",
                     resumable=True)  # fmt: skip
    lines = text(failed).splitlines()
    assert lines[0] == "**Failed**: `training diverged at step 7: loss nan / 'x'`; the same name goes on with it"
    assert lines[2].startswith("**Top-1 75.32%, top-5 92.51%** of 50,000 validation images: resnet-50 on")
    assert lines[2].endswith("12 of 90 epochs in 9:03:20")


def test_a_run_that_came_to_nothing_has_a_page():
    nothing = Result(name="a", status="stopped", epochs=0, steps=0, reason="interrupted before a checkpoint of its own")
    lines = text(nothing, {}, picture=False).splitlines()
    assert lines[0] == "**Stopped**: `interrupted before a checkpoint of its own`"
    assert lines[2] == "**Not evaluated**: resnet-50 on `imagenet`, 0 of 90 epochs in 0:00"
    assert cells("\n".join(lines))["top-1"] == ""
    absent = ("heckpoint:", "![", "**Code", "**Ray", "**Workers", "**Bad", "**Weights")
    assert not [line for line in lines if any(word in line for word in absent)]


def test_the_worst_classes_are_named_and_all_are_pointed_to():
    lines = text(table=rows()).splitlines()
    at = lines.index(
        "Classes that do worst (all of them: "
        "[per_class.json](get-artifact?path=per_class.json&run_uuid={run_id}), a table under Artifacts)"
    )
    assert [unspaced(line) for line in lines[at + 2 : at + 7]] == [
        ["class", "right", "top-1"],
        ["---", "---", "---"],
        ["`dog`", "3 of 10", "30.00%"],
        ["`cow`", "8 of 20", "40.00%"],
        ["`cat`", "9 of 10", "90.00%"],
    ]


def test_many_classes_are_five_lines():
    table = page.class_rows([f"n{i:08}" for i in range(1000)], [50] * 1000, [i % 50 for i in range(1000)])
    assert len([line for line in text(table=table).splitlines() if line.startswith("| `n0")]) == 5


def test_it_fits_whatever_things_are_called():
    """Names and reasons as long as they get: the result is still there, and MLflow takes it."""
    long = "x" * 4000
    table = page.class_rows([long, "<b>|`", "c"], [5, 5, 5], [0, 1, 2])
    shown = text(replace(RESULT, status="failed", reason=long), table=table, place=long)
    assert len(shown.replace("{run_id}", 32 * "0")) <= 8000
    assert shown.startswith("**Failed**: `xxx")
    assert "75.32%" in shown
    assert ["`<b>/'`", "1 of 5", "20.00%"] in map(unspaced, shown.splitlines())


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, ""), (3, "abc"), (7, "abc"), (8, "abc\n\ndef"), (20, "abc\n\ndef\n\nlonger")]
)
def test_blocks_that_fit(limit, kept):
    assert page.within(limit, ["abc", "def", "longer", "x" * 99, "y"]) == kept


# -- classes -----------------------------------------------------------------------------------------------------------


def test_classes_worst_first_and_those_without_images_last():
    found = page.class_rows(list("abcde"), [4, 8, 0, 4, 2], [1, 2, 0, 4, 0])
    assert [(row["label"], row["class"], row["images"], row["right"], row["top1"]) for row in found] == [
        (4, "e", 2, 0, 0.0),
        (1, "b", 8, 2, 0.25),  # of equal shares the one with more images
        (0, "a", 4, 1, 0.25),
        (3, "d", 4, 4, 1.0),
        (2, "c", 0, 0, None),
    ]


def test_counts_of_other_classes_are_a_bug():
    with pytest.raises(ValueError, match="zip"):
        page.class_rows(["a", "b"], [1], [1])


# -- the figure --------------------------------------------------------------------------------------------------------


def drawn(curve):
    """[(points, width)] of the lines of the figure."""
    svg = page.figure(curve)["svg"].decode()
    found = re.findall(r'<g id="line2d_\d+">\s*<path d="([^"]+)" clip-path[^>]*style="([^"]*)"', svg)
    widths = [(path, re.search(r"stroke-width: ([\d.]+)", style)) for path, style in found]
    return [(path.count("L") + path.count("M"), width[1]) for path, width in widths if width[1] in ("0.9", "2.4")]


def test_figure_is_loss_and_top1_training_thin_and_validation_bold():
    assert drawn(CURVE) == [(6, "0.9"), (5, "2.4"), (6, "0.9"), (5, "2.4")]


def test_figure_is_the_same_for_the_same_curve():
    first = page.figure(CURVE)
    assert first == page.figure(CURVE)
    assert first["png"].startswith(b"\x89PNG")
    assert [word for word in ("loss (nats)", "top-1 (%)") if f"<!-- {word} -->".encode() not in first["svg"]] == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_figure_of_a_loss_that_is_no_number(loss):
    """The evaluation may overflow where training still goes on: a gap."""
    assert drawn([*CURVE[:3], CURVE[3] | {"val_loss": loss}, *CURVE[4:]])[0] == (6, "0.9")


def test_figure_of_a_run_that_was_not_evaluated():
    assert page.figure([{"epoch": 1, "train_loss": 2.0, "train_top1": 0.1}])["png"].startswith(b"\x89PNG")


# -- publishing --------------------------------------------------------------------------------------------------------


class Tracker(NullTracker):
    """Remembers what it is told, in order."""

    def __init__(self):
        self.told = []

    def tags(self, values):
        self.told.append(("tags", values))

    def note(self, markdown):
        self.told.append(("note", markdown))

    def file(self, content, name):
        self.told.append((name, content))

    def table(self, rows, name):
        self.told.append((name, rows))


def unexpected(text):
    raise AssertionError(text)


def published(result=RESULT, counts=COUNTS, child=False, config=CONFIG, say=unexpected):
    tracker = Tracker()
    page.publish(tracker, config, PLAN, DATASET, result, counts, TAGS, say, child=child)
    return dict(tracker.told)


def test_a_run_gets_figure_table_tags_and_description():
    found = published()
    assert list(found) == ["curves.svg", "curves.png", "per_class.json", "tags", "note"]
    assert found["per_class.json"] == rows()
    assert found["note"] == text(table=rows())
    assert found["tags"] == {
        "skiplane.restarts": "2",
        "skiplane.resizes": "1",
        "skiplane.checkpoint": "/runs/a/checkpoints/step-000450000-0001.001",
        "skiplane.best_checkpoint": "/runs/a/checkpoints/step-000020000-0001.001",
    }


def test_a_run_of_a_study_or_sweep_gets_no_figure():
    found = published(child=True)
    assert list(found) == ["per_class.json", "tags", "note"]
    assert "![" not in found["note"]


def test_without_tracking_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(page, "figure", unexpected)
    assert published(config=CONFIG.replace({"tracking.uri": "off"})) == {}


def test_a_page_that_cannot_be_written_costs_the_run_nothing():
    said = []
    published(counts={"images": [1], "right": [1]}, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("the run's page in MLflow could not be written (ValueError: zip()")


def test_a_run_that_failed_before_its_first_epoch_gets_words():
    found = published(Result(name="a", status="failed", epochs=0, steps=0, reason="no room"), counts={})
    assert list(found) == ["tags", "note"]
    assert found["tags"] == {"skiplane.restarts": "0", "skiplane.resizes": "0"}
    assert found["note"].startswith("**Failed**: `no room`")
