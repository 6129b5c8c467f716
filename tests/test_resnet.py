"""The nets: names and shapes as torchvision's, arithmetic as the paper's, weights from a seed alone."""

import math

import pytest
import torch
from torch.nn import functional as F

from orchestrator.training.models.arch import Arch
from orchestrator.training.models.resnet import build

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def torchvision_names(depth: int) -> dict[str, tuple[int, ...]]:
    """Names, shapes and order of torchvision.models.resnet<depth>().state_dict(), its rule written out."""
    names: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, kernel: int) -> None:
        names[f"{name}.weight"] = (out, into, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            names[f"{name}.{part}"] = (channels,)
        names[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    wide, into = (4 if depth >= 50 else 1), 64
    for stage, count in enumerate(BLOCKS[depth], start=1):
        planes = 64 * 2 ** (stage - 1)
        for i in range(count):
            block = f"layer{stage}.{i}"
            kernels = (1, 3, 1) if depth >= 50 else (3, 3)
            channels = [into] + [planes] * (len(kernels) - 1) + [planes * wide]
            for k, kernel in enumerate(kernels, start=1):
                conv(f"{block}.conv{k}", channels[k], channels[k - 1], kernel)
                norm(f"{block}.bn{k}", channels[k])
            if i == 0 and into != planes * wide:
                conv(f"{block}.downsample.0", planes * wide, into, 1)
                norm(f"{block}.downsample.1", planes * wide)
            into = planes * wide
    names["fc.weight"], names["fc.bias"] = (1000, into), (1000,)
    return names


@pytest.mark.parametrize(("depth", "entries"), [(18, 122), (34, 218), (50, 320), (101, 626), (152, 932)])
def test_state_dict_names_are_torchvisions(depth, entries):
    state = build_meta(Arch(depth=depth, shortcut="B"))
    assert len(state) == entries
    assert list(state.items()) == list(torchvision_names(depth).items())


def build_meta(arch: Arch) -> dict[str, tuple[int, ...]]:
    from orchestrator.training.models.resnet import ResNet

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ResNet(arch).state_dict().items()}


def test_a_plain_net_is_its_twin_without_projections():
    plain, residual = build_meta(Arch(depth=50, shortcut="none")), build_meta(Arch(depth=50, shortcut="B"))
    assert plain == {name: shape for name, shape in residual.items() if "downsample" not in name}


def reference(arch: Arch, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The paper's text as functions over a state dict; evaluation mode."""

    def conv_norm(x: torch.Tensor, conv: str, norm: str, stride: int) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)
        shape = (1, -1, 1, 1)
        mean, var = state[f"{norm}.running_mean"].view(shape), state[f"{norm}.running_var"].view(shape)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * state[f"{norm}.weight"].view(shape) + state[f"{norm}.bias"].view(shape)

    def zero_padded(x: torch.Tensor, stride: int, channels: int) -> torch.Tensor:
        x = F.max_pool2d(x, 1, stride)  # every stride-th pixel
        return torch.cat([x, x.new_zeros(len(x), channels - x.shape[1], *x.shape[2:])], dim=1)

    bottleneck = arch.depth >= 50 and arch.layout == "imagenet"
    small = arch.stem == "small"
    x = conv_norm(x, "conv1", "bn1", 1 if small else 2).relu()
    x = x if small else F.max_pool2d(x, 3, 2, 1)
    counts = BLOCKS[arch.depth] if arch.layout == "imagenet" else [(arch.depth - 2) // 6] * 3
    for stage, count in enumerate(counts, start=1):
        for i in range(count):
            stride = 2 if stage > 1 and i == 0 else 1
            strides = {True: [stride, 1, 1] if arch.version == "v1" else [1, stride, 1], False: [stride, 1]}[bottleneck]
            name, out = f"layer{stage}.{i}", x
            for k, s in enumerate(strides, start=1):
                out = conv_norm(out, f"{name}.conv{k}", f"{name}.bn{k}", s)
                out = out.relu() if k < len(strides) else out
            if f"{name}.downsample.0.weight" in state:
                out = out + conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            elif arch.shortcut != "none":
                out = out + zero_padded(x, stride, out.shape[1])
            x = out.relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(
    "arch",
    [
        Arch("imagenet", 18, "none", 8, "small", classes=5),
        Arch("imagenet", 18, "A", 8, "imagenet", classes=5),
        Arch("imagenet", 18, "C", 8, "small", classes=5),
        Arch("imagenet", 50, "A", 4, "small", "v1", classes=5),
        Arch("imagenet", 50, "B", 4, "imagenet", "v1.5", classes=5),
        Arch("cifar", 8, "A", 4, "small", classes=5),
    ],
    ids=lambda arch: f"{arch.layout}-{arch.depth}-{arch.shortcut}-{arch.stem}",
)
def test_the_net_computes_what_the_paper_says(arch):
    model = build(arch, seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    state = model.state_dict()
    for name, tensor in state.items():  # nothing may hide behind gamma 1, beta 0, mean 0, variance 1
        if name.endswith(("running_mean", "running_var")) or ("bn" in name and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(2, 3, 33, 33, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(arch, state, x))


def test_weights_come_from_the_seed_alone():
    arch = Arch("cifar", 8, "B", 8, "small", classes=10)
    before = torch.random.get_rng_state()
    first, again, other = (build(arch, seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if name.startswith("fc.") or first[name].ndim == 4}


def test_he_normal_by_fan_out():
    weight = build(Arch(depth=34, width=16, shortcut="A"), seed=0).state_dict()["layer4.0.conv1.weight"]
    assert weight.shape == (128, 64, 3, 3)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)  # 73,728 draws: 0.3 % is one sigma
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)


def test_zero_init_starts_every_block_as_its_shortcut():
    arch = Arch("cifar", 14, "A", 8, "small", classes=10, zero_init=True)
    model = build(arch, seed=0).eval()
    x = torch.randn(2, 8, 8, 8).relu()
    torch.testing.assert_close(model.get_submodule("layer1")(x), x)


@pytest.mark.parametrize("shortcut", ["none", "A"])
def test_plain_and_residual_start_alike(shortcut):
    """The twins draw the same weights, so that a study compares the shortcut and nothing else."""
    one = build(Arch("cifar", 20, "none", 8, "small", classes=10), seed=3).state_dict()
    other = build(Arch("cifar", 20, shortcut, 8, "small", classes=10), seed=3).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
