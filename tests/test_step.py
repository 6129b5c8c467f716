"""The optimiser step, against torch's own SGD on plain modules."""

import copy
import io
import math
import re
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orchestrator.training.models.arch import Arch
from orchestrator.training.norm import norms, set_lanes
from orchestrator.training.step import check_finite, correct, to_host
from pipelines.errors import TrainingError
from tests.small import NET, batch, build, make_step, normalised, run, sha256, with_plain_norms


def plain_run(lanes, steps, *, decay_norm=True, smoothing=0.0, clip=0.0, **sgd):
    """The same training in plain torch: lanes one by one through torch's BatchNorm, the mean of their losses."""
    model = with_plain_norms(build(NET, 0))
    still = [] if decay_norm else [p for name, p in model.named_parameters() if p.ndim == 1]
    rest = [p for p in model.parameters() if not any(p is other for other in still)]
    decay = sgd.pop("weight_decay", 1e-4)
    optimizer = torch.optim.SGD(
        [{"params": rest, "weight_decay": decay}, {"params": still, "weight_decay": 0.0}],
        0.1,
        **{"momentum": 0.9} | sgd,
    )
    for number in range(steps):
        images, labels = batch(number, lanes)
        optimizer.zero_grad()
        for x, y in zip(normalised(images).chunk(lanes), labels.chunk(lanes), strict=True):
            (F.cross_entropy(model(x), y, label_smoothing=smoothing) / lanes).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
    return model, norm


def close(ours, theirs, but=(), **tolerance):
    for name, tensor in theirs.state_dict().items():
        if not any(part in name for part in but):
            torch.testing.assert_close(ours.state_dict()[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}  # four steps of float32 in another order


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"momentum": 0.0}, {"momentum": 0.0}),
        ({"nesterov": True}, {"nesterov": True}),
        ({"weight_decay": 0.05}, {"weight_decay": 0.05}),
        ({"weight_decay": 0.05, "decay_norm": False}, {"weight_decay": 0.05, "decay_norm": False}),
        ({"label_smoothing": 0.1}, {"smoothing": 0.1}),
        ({"clip_norm": 0.5}, {"clip": 0.5}),
    ],
)
def test_one_lane_trains_as_plain_torch(ours, theirs):
    step = make_step(1, **ours)
    stats = run(step, 0, 4, lanes=1)
    model, norm = plain_run(1, 4, **theirs)
    close(step.model, model, **TOLERANCE)
    torch.testing.assert_close(stats.grad_norm, norm, **TOLERANCE)


@pytest.mark.parametrize("settings", [{}, {"lanes_per_pass": 1}, {"lanes_per_pass": 3}, {"channels_last": True}])
@pytest.mark.parametrize("way", ["fast", "ordered", "exact"])
def test_fused_lanes_train_as_lanes_one_by_one_in_plain_torch(settings, way):
    if way == "exact" and settings.get("lanes_per_pass") == 3:
        settings = {}
    step = make_step(4, reduce=way, **settings)
    run(step, 0, 4, lanes=4)
    model, _ = plain_run(4, 4)
    # plain BatchNorm averages lane after lane; ours moves once a step: only weights can be compared
    close(step.model, model, but=("running", "num_batches"), **TOLERANCE)
    assert step.model.state_dict()["bn1.num_batches_tracked"] == 4


def test_running_averages_move_once_a_step_by_the_mean_over_lanes():
    lanes, step, expected = 4, make_step(4), None
    for number in range(3):
        images, labels = batch(number, lanes)
        model = with_plain_norms(copy.deepcopy(step.model), momentum=1.0).train()
        seen = []
        for x in normalised(images).chunk(lanes):
            model(x)
            seen.append(torch.stack([model.bn1.running_mean, model.bn1.running_var]))
        before = torch.stack([step.model.bn1.running_mean, step.model.bn1.running_var])
        expected = 0.9 * before + 0.1 * torch.stack(seen).mean(0)
        step(images, labels, 0.1)
        torch.testing.assert_close(torch.stack([step.model.bn1.running_mean, step.model.bn1.running_var]), expected)


def test_the_numbers_of_a_step_are_those_of_the_global_batch():
    images, labels = batch(0, 3)
    model = build(NET, 0)
    set_lanes(norms(model), 3, interleaved=False)
    logits = model(normalised(images).contiguous(memory_format=torch.channels_last)).detach()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    stats = make_step(3, lanes_per_pass=2)(images, labels, 0.1, request=2.5)
    torch.testing.assert_close(stats.loss, F.cross_entropy(logits, labels))
    assert (stats.top1, stats.top5) == ((ranks < 1).sum(), (ranks < 5).sum())
    assert (stats.samples, stats.request) == (18, 2.5)
    (host,) = to_host([stats])
    assert host["loss"] == pytest.approx(stats.loss.item())
    assert (host["samples"], host["request"]) == (18.0, 2.5)
    assert to_host([]) == []


def test_top5_of_fewer_classes_is_all_of_them():
    logits, labels = torch.tensor([[0.1, 0.2, 0.3], [3.0, 2.0, 1.0]]), torch.tensor([0, 0])
    assert [count.item() for count in correct(logits, labels)] == [1, 2]


def test_colour_reaches_the_net():
    images, labels = batch(0, 2)
    plain = make_step(2)(images, labels, 0.1)
    zero = make_step(2)(images, labels, 0.1, colour=torch.zeros(12, 3))
    shifted = make_step(2)(images, labels, 0.1, colour=torch.full((12, 3), 0.2))
    assert zero.loss == plain.loss != shifted.loss


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}, {"channels_last": True}, {"reduce": "exact"}])
def test_a_resumed_step_goes_on_with_the_same_bits(settings):
    undisturbed, first = make_step(2, **settings), make_step(2, **settings)
    run(undisturbed, 0, 5, lanes=2)
    run(first, 0, 2, lanes=2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_step(2, seed=1, **settings)
    run(second, 7, 8, lanes=2)  # whatever it held is replaced, momentum too
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, 2, 5, lanes=2)
    assert sha256(second.model) == sha256(undisturbed.model)


def test_a_state_of_another_net_is_refused():
    state = make_step(1).state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        make_step(1, arch=Arch("cifar", 14, "B", 4, "small", classes=7)).load_state_dict(state)
    state["momentum"] = {"fc.wait": torch.zeros(1)}
    with pytest.raises(KeyError, match=r"fc\.wait"):
        make_step(1).load_state_dict(state)


def test_bf16_stays_near_fp32_and_keeps_fp32_weights():
    fp32, bf16 = make_step(2), make_step(2, precision="bf16")
    expected, stats = run(fp32, 0, 3, lanes=2, lr=0.02), run(bf16, 0, 3, lanes=2, lr=0.02)
    assert stats.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    assert stats.loss != expected.loss  # it did something
    assert {p.dtype for p in bf16.model.parameters()} == {torch.float32}
    close(bf16.model, fp32.model, rtol=0.2, atol=0.05)


def test_channels_last_reaches_every_convolution():
    step, seen = make_step(2, channels_last=True), []
    for module in step.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    run(step, 0, 1, lanes=2)
    assert len(seen) == 9  # with two projections
    assert all(seen)


def test_the_net_is_one_graph():
    """For fused lanes in both layouts; `fullgraph` raises where torch.compile would break the graph."""
    for channels_last in (False, True):
        step = make_step(2, channels_last=channels_last)
        set_lanes(norms(step.model), 2, interleaved=not channels_last)
        x = torch.randn(12, 3, 8, 8)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        compiled = torch.compile(step.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), step.model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the compiler uses it itself
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_training_compiles_once_and_trains_alike(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool of processes to outlive the test
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, eager = make_step(2, compile=True), make_step(2)
    run(compiled, 0, 3, lanes=2)
    run(eager, 0, 3, lanes=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    close(compiled.model, eager.model, **TOLERANCE)
    assert list(compiled.state_dict()["model"]) == list(eager.state_dict()["model"])  # no prefix of the compiler's


def test_divergence_is_named():
    step = make_step(1)
    check_finite(run(step, 0, 1, lanes=1))
    stats = run(step, 1, 3, lanes=1, lr=1e30)
    with pytest.raises(TrainingError, match=r"training diverged at epoch 0, step 2: loss .*; lower optim\.lr"):
        check_finite(stats, "epoch 0, step 2")


@pytest.mark.parametrize("way", ["fast", "ordered", "exact"])
def test_a_gradient_that_is_no_number_is_found(way):
    step = make_step(2, reduce=way)
    with torch.no_grad():
        step.model.fc.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="training diverged: loss nan"):
        check_finite(run(step, 0, 1, lanes=2))


@pytest.mark.parametrize(
    ("lanes", "settings", "sentence"),
    [
        (2, {"total_lanes": 4}, "one rank plays 2 of 4 lanes; it must play all"),
        (0, {}, "0 lanes of 0"),
        (2, {"reduce": "exact", "lanes_per_pass": 2}, "lanes_per_pass is 2; reduce 'exact' runs lanes one by one"),
        (2, {"lanes_per_pass": -1}, "lanes_per_pass is -1; use 0 for all, or 1 and more"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(lanes, settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_step(lanes, **settings)


def test_a_batch_of_another_size_is_refused():
    images, labels = batch(0, 3)
    with pytest.raises(ValueError, match="18 images for 2 lanes of 6"):
        make_step(2)(images, labels, 0.1)
