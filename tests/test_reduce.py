"""Sums over lanes: what each way promises, between real processes."""

import numpy as np
import pytest
import torch

from tests.ranks import on_ranks
from tests.small import NET, batch, build, make_step, normalised, run, sha256, share, with_plain_norms

LANES = 8
WAYS = ["fast", "ordered", "exact"]


def one_step(rank, world_size, way, per_pass):
    """The state, the gradients and the numbers after one step of this rank."""
    rows = share(rank, world_size, LANES)
    lanes = (rows.stop - rows.start) // 6
    step = make_step(lanes, total_lanes=LANES, world_size=world_size, reduce=way, lanes_per_pass=per_pass)
    images, labels = batch(0, LANES)
    stats = step(images[rows], labels[rows], 0.1, request=float(rank))
    gradients = {name: p.grad.numpy().copy() for name, p in step.model.named_parameters()}
    numbers = {
        name: getattr(stats, name).item() for name in ("loss", "top1", "top5", "samples", "grad_norm", "request")
    }
    return gradients, numbers, {name: t.numpy() for name, t in step.model.state_dict().items()}


def expected_gradients():
    """The mean over lanes of plain backward passes with torch's own BatchNorm, and the mean statistics of its first."""
    images, labels = batch(0, LANES)
    model = with_plain_norms(build(NET, 0), momentum=1.0)
    losses, means, variances = [], [], []
    for x, y in zip(normalised(images).chunk(LANES), labels.chunk(LANES), strict=True):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        (loss / LANES).backward()
        losses.append(loss.item())
        means.append(model.bn1.running_mean.clone())
        variances.append(model.bn1.running_var.clone())
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return gradients, np.mean(losses), sum(means) / LANES, sum(variances) / LANES


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_gradient_is_the_mean_over_lanes(way, world_size):
    """Eight lanes over three ranks are 3, 3 and 2; with two lanes a pass a rank synchronises in its last pass only."""
    gradients, loss, mean, variance = expected_gradients()
    ranks = on_ranks(world_size, one_step, way, 0 if way == "exact" else 2)
    for own, numbers, state in ranks:
        for name, gradient in gradients.items():
            np.testing.assert_allclose(own[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)
        assert numbers["loss"] == pytest.approx(loss, rel=1e-6)
        assert numbers["samples"] == LANES * 6
        assert numbers["request"] == sum(range(world_size))
        np.testing.assert_allclose(state["bn1.running_mean"], 0.1 * mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state["bn1.running_var"], 0.9 + 0.1 * variance, rtol=1e-5)
        assert state["bn1.num_batches_tracked"] == 1
    first = ranks[0]
    for other in ranks[1:]:  # and all ranks hold the same bits
        assert other[1] == first[1]
        assert all(np.array_equal(first[2][name], other[2][name]) for name in first[2])


def several_steps(rank, world_size, way, per_pass, cuts):
    """sha256 after six steps, begun anew from the saved state at each cut."""
    rows = share(rank, world_size, LANES)
    settings = {"total_lanes": LANES, "world_size": world_size, "reduce": way, "lanes_per_pass": per_pass}
    state = None
    for first, last in zip([0, *cuts], [*cuts, 6], strict=True):
        step = make_step((rows.stop - rows.start) // 6, seed=first, **settings)  # weights come from the state alone
        if state is not None:
            step.load_state_dict(state)
        run(step, first, last, LANES, rows)
        state = step.state_dict()
    return sha256(step.model)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "per_pass"), [("fast", 0), ("fast", 1), ("ordered", 0), ("exact", 0)])
def test_a_resumed_run_ends_with_the_same_bits(way, per_pass):
    """Three ranks: with two DDP's trap does not show, since two numbers add up alike in either order."""
    undisturbed = on_ranks(3, several_steps, way, per_pass, [])
    resumed = on_ranks(3, several_steps, way, per_pass, [3])
    assert len({*undisturbed, *resumed}) == 1


@pytest.mark.slow
def test_exact_gives_the_same_bits_at_any_number_of_workers():
    hashes = [on_ranks(world_size, several_steps, "exact", 0, []) for world_size in (1, 2, 3)]
    assert len({value for ranks in hashes for value in ranks}) == 1


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="reduce is 'quick'; allowed: fast, ordered, exact"):
        make_step(1, reduce="quick")
