"""BatchNorm by lane, against nn.BatchNorm2d run lane by lane."""

import copy

import pytest
import torch
from torch import nn

from orchestrator.training.norm import LaneBatchNorm2d, RunningAverages, lane_sums, norms, set_lanes

CHANNELS, MICRO_BATCH, SIDE = 5, 6, 3


def affine(layer, generator):
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=generator)
        layer.bias.uniform_(-1, 1, generator=generator)
    return layer


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "lane-major"])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_fused_lanes_are_batchnorms_of_their_own(lanes, interleaved, generator):
    ours = affine(LaneBatchNorm2d(CHANNELS), generator).double()
    theirs = [nn.BatchNorm2d(CHANNELS, momentum=1.0).double() for _ in range(lanes)]
    for layer in theirs:
        layer.load_state_dict(ours.state_dict())
    # each lane with a mean and a spread of its own: [lanes, micro-batch, C, H, W]
    x = torch.randn(lanes, MICRO_BATCH, CHANNELS, SIDE, SIDE, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, lanes + 1).view(-1, 1, 1, 1, 1) + 10 * torch.arange(lanes).view(-1, 1, 1, 1, 1)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def rows(values):  # lanes side by side -> rows of one batch
        values = values.transpose(0, 1) if interleaved else values
        values = values.reshape(-1, CHANNELS, SIDE, SIDE)
        return values if interleaved else values.contiguous(memory_format=torch.channels_last)

    fused = rows(x).clone(memory_format=torch.preserve_format).requires_grad_()
    set_lanes([ours], lanes, interleaved=interleaved)
    out = ours(fused)
    out.backward(rows(dy))
    apart = x.clone().requires_grad_()
    expected = torch.stack([layer(lane) for layer, lane in zip(theirs, apart, strict=True)])
    expected.backward(dy)

    torch.testing.assert_close(out, rows(expected))
    torch.testing.assert_close(fused.grad, rows(apart.grad))
    torch.testing.assert_close(ours.weight.grad, sum(layer.weight.grad for layer in theirs))
    torch.testing.assert_close(ours.bias.grad, sum(layer.bias.grad for layer in theirs))
    means, variances = ours.statistics()
    torch.testing.assert_close(means, torch.stack([layer.running_mean for layer in theirs]))
    torch.testing.assert_close(variances, torch.stack([layer.running_var for layer in theirs]))  # unbiased
    assert torch.equal(lane_sums([ours]), torch.cat([means.sum(0), variances.sum(0)]))


def test_training_leaves_the_averages_alone(generator):
    layer = LaneBatchNorm2d(CHANNELS)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, CHANNELS, 2, 2, generator=generator))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_a_pass_of_fewer_lanes_after_one_of_more(generator):
    """A rank with three lanes, two a pass: the second pass must not see the first one's statistics."""
    layer = LaneBatchNorm2d(CHANNELS)
    x = torch.randn(2 * MICRO_BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    set_lanes([layer], 2, interleaved=True)
    layer(x)
    set_lanes([layer], 1, interleaved=True)
    layer(x[:MICRO_BATCH])
    means, variances = layer.statistics()
    torch.testing.assert_close(means, x[:MICRO_BATCH].mean((0, 2, 3))[None])
    torch.testing.assert_close(variances, x[:MICRO_BATCH].transpose(0, 1).flatten(1).var(1)[None])


def test_names_and_evaluation_are_batchnorms(generator):
    ours, theirs = affine(LaneBatchNorm2d(CHANNELS), generator), nn.BatchNorm2d(CHANNELS)
    ours.running_mean.uniform_(-1, 1, generator=generator)
    ours.running_var.uniform_(0.5, 2, generator=generator)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, CHANNELS, 1, 1, generator=generator)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_running_averages_follow_batchnorms(generator):
    """With one lane, what the step does once after each pass is what nn.BatchNorm2d does inside it."""
    theirs = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS))
    ours = nn.Sequential(LaneBatchNorm2d(CHANNELS), LaneBatchNorm2d(CHANNELS))
    averages = RunningAverages(norms(ours))
    for _ in range(3):
        x = 3 + torch.randn(MICRO_BATCH, CHANNELS, SIDE, SIDE, generator=generator)
        assert torch.equal(ours(x), theirs(x))
        averages.move(lane_sums(norms(ours)))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    assert ours.state_dict()["1.num_batches_tracked"] == 3
