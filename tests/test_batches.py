"""Batches: the same whoever plays which lanes and wherever it begins; bad images replaced, the rest untouched."""

import shutil
import threading

import numpy as np
import pytest
import torch

from pipelines.augment import Augment
from pipelines.batches import EvalBatches, SyntheticBatches, TrainBatches, lane_mates, neighbours
from pipelines.dataset import open_dataset
from pipelines.errors import ConfigError, DataError
from pipelines.order import Order
from pipelines.quarantine import CHECKSUM, BadSample, Quarantine, nearest
from pipelines.reader import Reader
from tests.datasets import make, overwrite, reopened
from tests.jpegs import BROKEN, evaluated

CPU = torch.device("cpu")
AUGMENT = Augment(size=32)
LANES, MICRO_BATCH = 6, 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("packed") / "data", val=13)


@pytest.fixture
def dataset(packed, tmp_path):
    """A copy to damage."""
    shutil.copytree(packed.root, tmp_path / "data")
    return open_dataset(tmp_path / "data")


def training(dataset, lanes=range(LANES), start=0, stop=5, limit=0, threads=2, prefetch=2, augment=AUGMENT, **order):
    settings = {"seed": 0, "streams": 2, "lanes": LANES, "micro_batch": MICRO_BATCH, "window": 2} | order
    return TrainBatches(
        Reader(dataset, "train", threads),
        Order(dataset.splits["train"].counts, **settings),
        augment,
        lanes=lanes,
        seed=settings["seed"],
        start=start,
        stop=stop,
        device=CPU,
        decode="cpu",
        threads=threads,
        prefetch=prefetch,
        quarantine=Quarantine(limit),
    )


def evaluation(dataset, ids, batch_size=4, limit=0, **settings):
    return EvalBatches(
        Reader(dataset, "val"),
        ids,
        **{"resize": 36, "size": 32} | settings,
        batch_size=batch_size,
        device=CPU,
        decode="cpu",
        threads=1,
        quarantine=Quarantine(limit),
    )


def taken(batches):
    """All of them, pixels copied; closed afterwards."""
    with batches:
        return [
            (b.epoch, b.step, b.ids.tolist(), b.labels.tolist(), b.images.clone(), b.digest, b.bad) for b in batches
        ]


def test_padded_crops_reach_the_loop(packed):
    """Padded by more than an image is wide: some pixels are zeros, and all lanes of two ranks are those of one."""
    augment = Augment("pad_crop", size=32, pad=100)
    whole = taken(training(packed, stop=1, augment=augment))[0][4]
    shares = [taken(training(packed, lanes=lanes, stop=1, augment=augment))[0][4] for lanes in (range(2), range(2, 6))]
    assert (torch.cat(shares) == whole).all()
    assert 0.1 < (whole == 0).float().mean() < 1


def test_images_too_small_for_their_crops_are_refused_at_once(packed):
    with pytest.raises(ConfigError, match=r"pad_crop with data.size = 64 and data.pad = 4, .* side of 40 px"):
        training(packed, augment=Augment("pad_crop", size=64))


def test_batches_cross_epochs_without_a_seam(packed):
    got = taken(training(packed))
    assert [b[:2] for b in got] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert all(b[4].shape == (LANES * MICRO_BATCH, 32, 32, 3) and b[4].dtype == torch.uint8 for b in got)
    order = Order(packed.splits["train"].counts, 0, 2, LANES, MICRO_BATCH, 2)
    assert [b[2] for b in got] == [order.ids(*b[:2], range(LANES)).ravel().tolist() for b in got]


def test_labels_belong_to_their_images(packed):
    """The label of the test's images is their number modulo 4, and the number stands in the key."""
    reader = Reader(packed, "train")
    for _, _, ids, labels, *_ in taken(training(packed, stop=2)):
        assert labels == [int(reader.name(i)[1].rsplit("-", 1)[1]) % 4 for i in ids]


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_run_that_begins_in_the_middle_sees_what_the_whole_one_sees(packed, start):
    whole, part = taken(training(packed)), taken(training(packed, start=start, threads=1, prefetch=1))
    for a, b in zip(whole[start:], part, strict=True):
        assert a[:4] == b[:4]
        assert torch.equal(a[4], b[4])
        assert a[5] == b[5]


@pytest.mark.parametrize("shares", [(6,), (3, 3), (2, 2, 2), (1, 4, 1)])
def test_any_number_of_workers_feeds_the_same(packed, shares):
    """Pixels lane for lane, and the data digest, equal for 1, 2, 3 ranks, even and uneven."""
    whole, first, ranks = taken(training(packed)), 0, []
    for share in shares:
        ranks.append(taken(training(packed, range(first, first + share))))
        first += share
    for step, one in enumerate(whole):
        assert torch.equal(torch.cat([rank[step][4] for rank in ranks]), one[4])
        assert sum(rank[step][5] for rank in ranks) % 2**64 == one[5]


def test_another_seed_feeds_others(packed):
    one, other = taken(training(packed)), taken(training(packed, seed=1))
    assert not {b[5] for b in one} & {b[5] for b in other}


@pytest.mark.parametrize("kind", [*BROKEN, "checksum"])
def test_a_bad_image_is_named_and_replaced_and_the_rest_is_bit_equal(packed, dataset, kind):
    whole = taken(training(packed, stop=2))
    lane, place = 4, 1
    row = lane * MICRO_BATCH + place
    victim = whole[0][2][row]
    data = Reader(packed, "train").read(np.array([victim])).image(0).tobytes()
    if kind == "checksum":
        overwrite(dataset, "train", victim, data[:-9] + bytes(9), index_too=False)
    else:
        overwrite(dataset, "train", victim, BROKEN[kind](data)[: len(data)])
    got = taken(training(reopened(dataset), stop=2, limit=1))
    (bad,) = got[0][6]
    neighbour = row - 1  # the nearer ones are at 0 and 2: the earlier wins
    assert (bad.id, bad.replaced_by) == (victim, whole[0][2][neighbour])
    assert (bad.shard, bad.key) == Reader(packed, "train").name(victim)
    assert bad.reason
    assert (bad.reason == CHECKSUM) == (kind == "checksum")
    rows = np.arange(LANES * MICRO_BATCH)
    rows[row] = neighbour
    assert torch.equal(got[0][4], whole[0][4][rows])
    assert got[0][2] == np.array(whole[0][2])[rows].tolist()
    assert got[0][3] == np.array(whole[0][3])[rows].tolist()
    assert got[0][5] != whole[0][5]  # the digest tells that something else was fed
    assert torch.equal(got[1][4], whole[1][4])
    assert (got[1][5], got[1][6]) == (whole[1][5], ())


def test_neighbours_that_are_bad_too_are_passed_over(packed, dataset):
    ids = taken(training(packed, stop=1))[0][2]
    for victim in ids[:2]:
        overwrite(dataset, "train", victim, b"no image")
    got = taken(training(reopened(dataset), stop=1, limit=2))[0]
    assert [(b.id, b.replaced_by) for b in got[6]] == [(ids[0], ids[2]), (ids[1], ids[2])]
    overwrite(dataset, "train", ids[2], b"no image")
    with pytest.raises(DataError, match=r"train-\d+\.tar cannot be used \(.*nor can any image that may stand in"):
        taken(training(reopened(dataset), stop=1, limit=3))


def test_too_many_bad_images_fail_the_run(packed, dataset):
    ids = taken(training(packed, stop=1))[0][2]
    for victim in (ids[0], ids[4], ids[8]):
        overwrite(dataset, "train", victim, b"no image")
    with pytest.raises(
        DataError, match=r"bad image \d+-image-\d+ in train-\d+\.tar \(.*\) is number 3; data\.max_bad"
    ) as e:
        taken(training(reopened(dataset), stop=1, limit=2))
    assert "allows 2 in this split: repair the data or raise data.max_bad" in str(e.value)
    assert len(taken(training(reopened(dataset), stop=1, limit=3))[0][6]) == 3


def test_the_quarantine_counts_and_tells_each_image_once():
    told = []
    quarantine = Quarantine(1, told.append)
    for _ in range(5):
        quarantine.add(BadSample(7, "s", "k", "r", 8))
    assert quarantine.count == 1
    with pytest.raises(DataError, match=r"is number 2; data\.max_bad allows 1"):
        quarantine.add(BadSample(9, "s", "k", "r", 8))
    assert [bad.id for bad in told] == [7, 9]  # the one past the limit too


@pytest.mark.parametrize(
    ("place", "group", "order"),
    [
        (0, "abcd", "bcd"),
        (1, "abcd", "acd"),  # of two as near the earlier one
        (2, "abcd", "bda"),
        (3, "abcd", "cba"),
        (0, "a", ""),
    ],
)
def test_the_nearest_come_first(place, group, order):
    assert "".join(nearest(place, group)) == order


def test_stand_ins_of_training_stay_in_their_lane():
    ids = np.array([[10, 11, 12], [20, 21, 22]])
    assert list(lane_mates(ids, 3)) == [21, 22]
    assert list(lane_mates(ids, 2)) == [11, 10]


def test_stand_ins_of_evaluation_are_neighbours_in_the_split():
    assert list(neighbours(np.array([0, 4]), 5, 1)) == [3, 2, 1, 0]
    assert list(neighbours(np.array([2]), 5, 0)) == [1, 3, 0, 4]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_shows_each_image_once_at_any_number_of_workers(packed, world):
    ranks = [taken(evaluation(packed, range(rank, 13, world))) for rank in range(world)]
    seen = [i for rank in ranks for b in rank for i in b[2]]
    assert sorted(seen) == list(range(13))
    assert sum(b[5] for rank in ranks for b in rank) % 2**64 == sum(
        b[5] for b in taken(evaluation(packed, range(13), 13))
    )
    assert all(b[:2] == (0, 0) for rank in ranks for b in rank)


def test_evaluations_pixels_are_pillows(packed):
    reader = Reader(packed, "val")
    for _, _, ids, _, images, *_ in taken(evaluation(packed, range(13), resize=40)):
        for sample, image in zip(ids, images.numpy().astype(np.int16), strict=True):
            data = reader.read(np.array([sample])).image(0).tobytes()
            assert np.abs(image - evaluated(data, 40, 32)).max() <= 1


def test_evaluation_replaces_a_bad_image_by_the_same_one_at_any_number_of_workers(dataset):
    overwrite(dataset, "val", 5, b"no image")
    overwrite(dataset, "val", 4, b"no image")
    dataset = reopened(dataset)
    digests = set()
    for world in (1, 2, 3):
        batches = [b for rank in range(world) for b in taken(evaluation(dataset, range(rank, 13, world), limit=2))]
        bad = sorted((x.id, x.replaced_by) for b in batches for x in b[6])
        assert bad == [(4, 3), (5, 6)]
        assert sum(len(b[2]) for b in batches) == 13
        digests.add(sum(b[5] for b in batches) % 2**64)
    assert len(digests) == 1


def test_no_share_at_all_is_no_batch(packed):
    assert taken(evaluation(packed, range(0))) == []


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("skiplane-") and "read_" not in t.name}


def test_closing_early_leaves_no_thread(packed):
    with training(packed, stop=1000) as batches:
        next(iter(batches))
        assert threads() >= {"skiplane-decode", "skiplane-ahead", "skiplane-resize_0"}
    assert threads() == set()


def test_no_thread_is_left_after_the_end_or_an_error(packed, dataset):
    taken(training(packed))
    (dataset.root / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar cannot be opened"):
        taken(training(dataset, stop=100))
    assert threads() == set()


def test_nothing_runs_before_the_first_batch_is_asked_for_and_iterating_again_begins_anew(packed):
    batches = training(packed, stop=3)
    assert threads() == set()
    assert next(iter(batches)).digest == next(iter(batches)).digest
    batches.close()
    assert threads() == set()


def test_synthetic_batches_have_the_same_surface():
    with SyntheticBatches(n=6, size=8, classes=5, start=3, stop=6, steps_per_epoch=4, device=CPU) as batches:
        got = list(batches)
    assert [(b.epoch, b.step) for b in got] == [(0, 3), (1, 0), (1, 1)]
    assert got[0].images.shape == (6, 8, 8, 3)
    assert got[0].labels.max() < 5
