"""Which nets exist, and what is said of those that do not."""

import re

import pytest

from orchestrator.training.models.arch import Arch


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"depth": 33}, "depth is 33; the imagenet layout has 18, 34, 50, 101, 152 (nearest: 34)"),
        ({"depth": 0}, "(nearest: 18)"),
        ({"depth": 1000}, "(nearest: 152)"),
        (
            {"layout": "cifar", "depth": 18},
            "depth is 18; the cifar layout has 6n+2: 8, 14, 20, 26, 32, … (nearest: 20)",
        ),
        ({"layout": "cifar", "depth": 2}, "(nearest: 8)"),  # n = 0 is no net
        ({"layout": "cifar", "depth": 33}, "(nearest: 32)"),
        ({"layout": "vgg"}, "layout is 'vgg'; allowed: imagenet, cifar"),
        ({"shortcut": "D"}, "shortcut is 'D'; allowed: none, A, B, C"),
        ({"stem": "big"}, "stem is 'big'; allowed: imagenet, small"),
        ({"version": "v2"}, "version is 'v2'; allowed: v1, v1.5"),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"classes": 0}, "classes is 0; it must be at least 1"),
        ({"shortcut": "none", "zero_init": True}, "zero_init is true for a plain net"),
    ],
)
def test_a_net_that_does_not_exist_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Arch(**settings)


def test_names():
    assert Arch(depth=34, shortcut="none").name == "plain-34"
    assert Arch(depth=50, shortcut="C").name == "resnet-50"


@pytest.mark.parametrize(("layout", "depth"), [("imagenet", d) for d in (18, 34, 50, 101, 152)] + [("cifar", 56)])
def test_depth_is_the_number_of_weight_layers(layout, depth):
    arch = Arch(layout=layout, depth=depth)
    assert 1 + sum(len(block.convs) for block in arch.blocks) + 1 == depth  # stem and classifier; no projections


@pytest.mark.parametrize(
    ("shortcut", "of_first_blocks"),
    [
        # stage 1 keeps shape in a net of basic blocks: only C projects there
        ("none", ["none"] * 4),
        ("A", ["identity", "pad", "pad", "pad"]),
        ("B", ["identity", "projection", "projection", "projection"]),
        ("C", ["projection"] * 4),
    ],
)
def test_shortcuts_of_each_stage(shortcut, of_first_blocks):
    blocks = Arch(depth=18, shortcut=shortcut).blocks
    assert [block.shortcut for block in blocks if block.name.endswith(".0")] == of_first_blocks
    rest = {block.shortcut for block in blocks if block.name.endswith(".1")}
    assert rest == {{"none": "none", "C": "projection"}.get(shortcut, "identity")}


@pytest.mark.parametrize(("version", "strides"), [("v1", (2, 1, 1)), ("v1.5", (1, 2, 1))])
def test_where_a_bottleneck_has_its_stride(version, strides):
    (block,) = [block for block in Arch(depth=50, version=version).blocks if block.name == "layer2.0"]
    assert tuple(conv.stride for conv in block.convs) == strides
    assert block.stride == 2
