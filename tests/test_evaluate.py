"""Exact evaluation: the same integers however the images are split."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orchestrator.training.evaluate import EvalSums, evaluate
from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD
from tests.ranks import on_ranks
from tests.small import NET, batch, build, normalised

IMAGES, LABELS = batch(0, 9)  # 54 images
IMAGES, LABELS = IMAGES[:53], LABELS[:53]  # no worker count and no batch size divides them


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    digest: int


def share(rank, world_size, size):
    """This rank's images, every world_size-th one, in batches; the digest of an image is a large odd number."""
    ids = torch.arange(len(IMAGES))[rank::world_size]
    for part in ids.split(size):
        digest = sum((2 * i + 1) * 0x9E3779B97F4A7C15 for i in part.tolist()) % 2**64
        yield Batch(IMAGES[part], LABELS[part], digest)


def sums(rank=0, world_size=1, size=8, model=None, **settings):
    model = model or build(NET, 0)
    own = evaluate(model, share(rank, world_size, size), IMAGENET_MEAN, IMAGENET_STD, batch_size=8, **settings)
    return own.all_reduce()


def test_counts_and_loss():
    model = build(NET, 0).eval()
    logits = model(normalised(IMAGES)).detach()
    ranks = (logits > logits.gather(1, LABELS[:, None])).sum(1)
    result = sums()
    assert (result.count, result.top1, result.top5) == (53, (ranks < 1).sum(), (ranks < 5).sum())
    assert result.loss == pytest.approx(F.cross_entropy(logits, LABELS).item(), abs=2**-20 + 1e-6)
    assert (result.top1_share, result.top5_share) == (result.top1 / 53, result.top5 / 53)


def counted(model):
    """(images, right) by class, image by image."""
    likeliest = model.eval()(normalised(IMAGES)).argmax(1)
    images, right = [0] * NET.classes, [0] * NET.classes
    for guess, label in zip(likeliest.tolist(), LABELS.tolist(), strict=True):
        images[label] += 1
        right[label] += guess == label
    return tuple(images), tuple(right)


def test_counts_by_class():
    model = build(NET, 0)
    result = sums(model=model, classes=NET.classes)
    images, right = counted(model)
    assert (result.class_images, result.class_right) == (images, right)
    assert (sum(images), sum(right)) == (result.count, result.top1)
    assert 0 < sum(right) < sum(images)
    assert replace(result, class_images=(), class_right=()) == sums(model=model)


@pytest.mark.parametrize("world_size", [2, 53, 54])  # the last rank of 54 has no image
def test_counts_by_class_add_up_at_any_split(world_size):
    model = build(NET, 0)
    parts = [sums(rank, world_size, 5, model, classes=NET.classes) for rank in range(world_size)]
    assert sum(parts, EvalSums()) == sums(model=model, classes=NET.classes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 53])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_any_split_gives_the_same_integers(world_size, size):
    model = build(NET, 0)
    parts = [sums(rank, world_size, size, model) for rank in range(world_size)]
    assert sum(parts, EvalSums()) == sums(size=8)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_hold_the_sum(world_size):
    assert on_ranks(world_size, by_class) == [by_class()] * world_size


def by_class(rank=0, world_size=1):
    return sums(rank, world_size, classes=NET.classes)


def test_a_rank_without_images_adds_nothing():
    assert evaluate(build(NET, 0), [], IMAGENET_MEAN, IMAGENET_STD) == EvalSums()
    assert math.isnan(EvalSums().loss)
    assert math.isnan(EvalSums().top1_share)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training):
    model = build(NET, 0).train(training)
    sums(model=model)
    assert model.training == training


def test_a_loss_that_is_no_number_is_counted_and_shown():
    model = build(NET, 0)
    with torch.no_grad():
        model.fc.bias[3] = math.nan
    result = sums(model=model)
    assert (result.count, result.nonfinite) == (53, 53)
    assert math.isnan(result.loss)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"channels_last": True}])
def test_other_arithmetic_is_near(settings):
    assert sums(**settings).loss == pytest.approx(sums().loss, rel=0.01)


def test_digests_add_modulo_64_bits():
    large = EvalSums(digest=2**64 - 1, class_images=(1, 2), class_right=(0, 2))
    assert (large + EvalSums(digest=2)) == replace(large, digest=1)
    assert large.all_reduce().digest == 2**64 - 1
