"""The format of checkpoints' tensors: what is written is read bit for bit, and others can read it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.training import safetensors
from orchestrator.training.models.weights import read_weights
from orchestrator.training.safetensors import DTYPES, Layout
from pipelines.errors import ConfigError

TENSORS = {
    "model.w": torch.arange(6.0).view(2, 3),
    "model.flag": torch.tensor([True]),
    "momentum.count": torch.tensor(3),
}


def written(tensors, groups=()):
    layout = Layout.of(tensors, groups)
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    memory[: len(layout.head)] = torch.frombuffer(bytearray(layout.head), dtype=torch.uint8)
    for view, name in zip(layout.views(memory), layout.names, strict=True):
        view.copy_(tensors[name])
    return bytes(memory.numpy())


def document(header, body=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_the_bytes_are_those_of_the_format():
    """The widest elements first, the header filled up with spaces, as the format's own library writes them."""
    data = written(TENSORS, ("model", "momentum"))
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert length % 8 == 0
    assert header == {
        "__metadata__": {"format": "pt", "groups": "model momentum"},
        "momentum.count": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
        "model.w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
        "model.flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [32, 33]},
    }
    assert body == b"\x03" + bytes(7) + TENSORS["model.w"].numpy().tobytes() + b"\x01"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=6))
def test_any_tensors_come_back_bit_for_bit(kinds):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(DTYPES[code])
        for i, (code, shape) in enumerate(kinds)
    }
    found, groups = safetensors.read(written(tensors, ("a", "b")))
    assert (set(found), groups) == (set(tensors), ("a", "b"))
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_tensors_of_another_layout_are_written_row_by_row():
    strided = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert torch.equal(safetensors.read(written({"w": strided}))[0]["w"], strided)


def test_groups_without_a_tensor_are_there():
    """Before the first step there is no momentum."""
    assert safetensors.grouped(written({}, ("model", "momentum"))) == {"model": {}, "momentum": {}}


def test_a_dtype_that_the_format_lacks_is_refused():
    with pytest.raises(ValueError, match=r"w is torch.complex64, which safetensors does not have"):
        Layout.of({"w": torch.zeros(1, dtype=torch.complex64)})


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80" + bytes(20),
        (2**62).to_bytes(8, "little") + b"{}",
        document([]),
        document({"w": 1}),
        document({"w": ENTRY}, bytes(7)),  # ends too early
        document({"w": ENTRY | {"shape": [3]}}, bytes(8)),
        document({"w": ENTRY | {"shape": [-1, -2]}}, bytes(8)),
        document({"w": ENTRY | {"data_offsets": [-8, 0]}}, bytes(8)),
        document({"w": ENTRY | {"dtype": "F8"}}, bytes(8)),
        document({"w": ENTRY | {"more": 1}}, bytes(8)),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="no safetensors file"):
        safetensors.read(data)
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"weights file .* cannot be used: it is no file of tensors"):
        read_weights(str(tmp_path / "w.safetensors"))


def test_weights_are_read_from_a_checkpoint_and_from_anybodys_file(tmp_path):
    bare = {"conv1.weight": torch.ones(2), "fc.bias": torch.zeros(3)}
    (tmp_path / "bare.safetensors").write_bytes(written(bare))
    ours = {f"model.{name}": tensor for name, tensor in bare.items()} | {"momentum.fc.bias": torch.ones(3)}
    (tmp_path / "ours.safetensors").write_bytes(written(ours, ("model", "momentum")))
    for name in ("bare", "ours"):
        found = read_weights(str(tmp_path / f"{name}.safetensors"))
        assert found.keys() == bare.keys()
        assert all(torch.equal(found[n], bare[n]) for n in bare)
