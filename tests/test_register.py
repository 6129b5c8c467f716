"""Which images of a run are bad: each once, whoever met it and however often, and the one cap over all of them."""

import json

import pytest

from jobs.train import report
from orchestrator.config import RunConfig
from orchestrator.feed import bad_record
from orchestrator.progress import Ear
from orchestrator.state.records import Result, read_result, write_result
from orchestrator.state.register import NAME, BadImage, Register
from orchestrator.state.storage import Storage
from orchestrator.tracking import NullTracker
from pipelines.errors import DataError
from pipelines.quarantine import CHECKSUM, BadSample, allowed


def image(number, split="train", replaced_by=0):
    return BadImage(split, number, f"{split}-000001.tar", f"key-{number}", CHECKSUM, replaced_by)


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "run"))


def opened(storage, said=None, train=2, val=0):
    return Register(storage, {"train": train, "val": val}, [].append if said is None else said.append)


def test_an_image_is_new_once_over_workers_and_submissions(storage):
    first = opened(storage)
    assert first.add([image(1), image(1, replaced_by=9)]) == [image(1)]  # two workers, one image: the first counts
    assert first.add([image(1)]) == []
    assert first.add([image(1, split="val")]) == [image(1, split="val")]
    again = opened(storage)
    assert again.images == (image(1), image(1, split="val"))
    assert again.add([image(1), image(2)]) == [image(2)]
    assert opened(storage).images == (image(1), image(1, split="val"), image(2))


def test_a_run_without_bad_images_writes_nothing(storage):
    assert opened(storage).add([]) == []
    assert storage.names() == []


def test_two_workers_below_the_limit_are_above_it_together(storage):
    """Each has met two, and two are allowed; the third distinct one is too many, whoever met it."""
    register = opened(storage, train=2)
    one, other = [image(1), image(2)], [image(2), image(3)]
    register.add(one)
    register.check(one)
    register.add(other)
    with pytest.raises(DataError) as caught:
        register.check(other)
    assert str(caught.value) == (
        "bad images in train: 3, data.max_bad allows 2; the last: key-3 in train-000001.tar (its bytes do not match "
        "their checksum); repair the data (python -m jobs.pack verify DATASET --decode finds what is damaged) and "
        f"remove {storage.place}/bad_images.json, or raise data.max_bad"
    )


def test_the_cap_holds_over_submissions_but_only_what_is_met_fails(storage):
    opened(storage).add([image(1), image(2), image(3)])
    opened(storage, train=3).check([image(3)])  # data.max_bad was raised
    again = opened(storage, train=2)
    again.check([])  # the data was repaired: nothing is met any more
    with pytest.raises(DataError, match=r"^bad images in train: 3, .* the last: key-1 in"):
        again.check([image(1)])


def test_each_split_has_its_own_cap(storage):
    register = opened(storage, train=2, val=1)
    met = [image(1), image(2), image(1, split="val")]
    register.add(met)
    register.check(met)
    register.add([image(2, split="val")])
    register.check([image(1)])
    with pytest.raises(DataError, match=r"^bad images in val: 2, data\.max_bad allows 1; the last: key-2 in val"):
        register.check([image(1), image(2, split="val")])


@pytest.mark.parametrize("torn", [b"", b'[{"split": "tr', b"null", b'[{"split": "train"}]', b'{"a": 1}', b"\xff"])
def test_a_torn_register_is_said_and_begun_anew(storage, torn):
    storage.write(NAME, torn)
    said = []
    register = opened(storage, said)
    assert register.images == ()
    assert said == [
        f"{storage.place}/bad_images.json is damaged: the bad images found before are forgotten, and counted anew when "
        "met again"
    ]
    register.add([image(1)])
    assert opened(storage, said).images == (image(1),)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("share", "samples", "images"),
    [
        (1e-4, 1_281_167, 128),
        (1e-4, 9_999, 0),
        (1e-4, 10_000, 1),
        (3e-4, 10_000, 3),  # 2.9999999999999996
        (0, 10_000, 0),
        (1, 7, 7),
    ],
)
def test_what_a_share_allows(share, samples, images):
    assert allowed(share, samples) == images


# -- who hears of them -------------------------------------------------------------------------------------------------


class Tracker(NullTracker):
    """Remembers tables and tags."""

    def __init__(self):
        self.tables, self.tagged = [], {}

    def table(self, rows, name):
        self.tables.append((name, [row["key"] for row in rows]))

    def tags(self, values):
        self.tagged |= values


def record(number, split="train"):
    return bad_record(BadSample(number, f"{split}-000001.tar", f"key-{number}", CHECKSUM, 0), split)


def ear(storage, tracker, said, **limits):
    return Ear(RunConfig(), None, opened(storage, said, **limits), tracker, said.append, lambda record: None)


def test_a_bad_image_is_said_once_and_the_table_is_shown_once_a_look(storage):
    said, tracker = [], Tracker()
    heard = ear(storage, tracker, said)
    heard.hear([record(1), record(2), record(1)])
    heard.hear([record(2)])
    heard.hear([])
    line = "bad image in train: train-000001.tar key-{} (its bytes do not match their checksum), replaced by sample 0"
    assert said == [line.format(1), line.format(2)]
    assert tracker.tables == [("bad_images.json", ["key-1", "key-2"])]
    assert tracker.tagged == {"skiplane.bad_images": "2"}


def test_the_image_past_the_limit_is_said_kept_and_shown_before_the_run_fails(storage):
    said, tracker = [], Tracker()
    with pytest.raises(DataError, match=r"bad images in val: 1, data\.max_bad allows 0"):
        ear(storage, tracker, said).hear([record(5, "val")])
    assert len(said) == 1
    assert tracker.tables == [("bad_images.json", ["key-5"])]
    assert [i["id"] for i in json.loads(storage.read(NAME))] == [5]


def test_a_new_submission_says_what_is_known_and_shows_it(storage):
    opened(storage).add([image(1)])
    said, tracker = [], Tracker()
    ear(storage, tracker, said).hear([record(1)])
    assert said == [f"bad images known from before: 1, see {storage.place}/bad_images.json"]
    assert tracker.tables == [("bad_images.json", ["key-1"])]


def test_the_result_keeps_them(storage):
    summary = {"status": "finished", "epochs": 1, "steps": 2, "bad_samples": 4}
    register = opened(storage)
    register.add([image(1)])
    write_result(storage, Result.of(summary, name="a", bad_images=register.to_list()))
    assert read_result(storage).bad_images == [
        {
            "split": "train",
            "id": 1,
            "shard": "train-000001.tar",
            "key": "key-1",
            "reason": CHECKSUM,
            "replaced_by": 0,
        }
    ]


@pytest.mark.parametrize(
    ("bad", "times", "read", "validated"),
    [
        ([], 0, "0 times a bad image was replaced", "360 validation images"),
        (["train"], 1, "1 bad image, replaced 1 time", "360 validation images"),
        (["train", "val", "train"], 9, "2 bad images, replaced 9 times", "360 validation images, 1 of them bad"),
        (["val"], 0, "0 times a bad image was replaced", "360 validation images, 1 of them bad and replaced"),
    ],
)
def test_the_report_counts_images_and_replacements(bad, times, read, validated):
    images = [{"split": split} for split in bad]
    shown = report(
        Result(
            "a",
            "finished",
            1,
            2,
            top1=0.5,
            top5=0.9,
            val_samples=360,
            train_loss=0.1,
            data_digest="d",
            bad_samples=times,
            bad_images=images,
        )
    ).splitlines()
    assert shown[1].startswith(f"  top-1 / top-5  50.00% / 90.00% of {validated}")
    assert shown[4] == f"  data read      digest d, {read}"
