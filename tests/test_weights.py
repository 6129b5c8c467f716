"""Starting from a file of weights."""

import re

import pytest
import torch

from orchestrator.training.models.arch import Arch
from orchestrator.training.models.resnet import build
from orchestrator.training.models.weights import load_weights
from pipelines.errors import ConfigError


def net(seed=0, **settings):
    return build(Arch(**{"depth": 18, "shortcut": "B", "width": 4, "classes": 10} | settings), seed)


def equal(a, b, but=()):
    return all(torch.equal(a[name], b[name]) for name in a if name not in but)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_all_tensors_are_taken_over(prefix):
    model, source = net(0), net(1).state_dict()
    note = load_weights(model, {prefix + name: tensor for name, tensor in source.items()})
    assert note == "122 tensors loaded"
    assert equal(model.state_dict(), source)


def test_another_number_of_classes_gets_a_new_head():
    model, source = net(0, classes=7), net(1).state_dict()
    head = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("fc.")}
    assert load_weights(model, source) == "120 tensors loaded; new head for 7 classes (the file has 10)"
    assert equal(model.state_dict(), source, but=head)
    assert equal(head, model.state_dict())


def test_old_files_count_no_batches():
    source = {name: t for name, t in net(1).state_dict().items() if not name.endswith("num_batches_tracked")}
    assert load_weights(net(0), source) == "102 tensors loaded"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"depth": 34}, "80 missing (layer1.2.bn1.bias, "),
        ({"shortcut": "A"}, "18 unknown (layer2.0.downsample.0.weight, "),
        ({"width": 8}, "101 of another shape (bn1.bias, bn1.running_mean, bn1.running_var, bn1.weight, …)"),
    ],
)
def test_another_net_is_refused_and_nothing_is_copied(settings, sentence):
    model, source = net(0, **settings), net(1).state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=re.escape(sentence)) as refused:
        load_weights(model, source)
    assert "set model.depth, shortcut, width and stem to the file's" in str(refused.value)
    assert equal(before, model.state_dict())
