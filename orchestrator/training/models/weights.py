"""Starting from somebody's weights: torchvision's names, with or without DDP's prefix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.training import safetensors
from pipelines.errors import ConfigError

HEAD = ("fc.weight", "fc.bias")
SHOWN = 4  # names in a message


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a file of torch's or a .safetensors: bare, or under "model" as our own checkpoints have it.

    Nothing in the file is executed. Raises ConfigError where it holds no tensors by name.
    """
    refused = f"weights file {path} cannot be used"
    try:
        loaded = _safetensors(path) if path.endswith(".safetensors") else _torchs(path)
    except OSError as error:
        raise ConfigError(f"{refused}: {error.strerror}") from error
    except Exception as error:  # torch raises many kinds, with advice that a stranger's file must not be given
        raise ConfigError(f"{refused}: it is no file of tensors that torch reads without executing code") from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{refused}: it holds no state dict (names and tensors)")
    return state


def _torchs(path: str) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def _safetensors(path: str) -> Mapping[str, Any]:
    data = Path(path).read_bytes()
    flat, groups = safetensors.read(data)
    return safetensors.grouped(data) if "model" in groups else flat


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Copy `state` into the model; returns one sentence that says what was done.

    DDP's "module." before every name is taken off. Where the number of classes differs, the model keeps the head it
    was built with. `num_batches_tracked` may be missing (old files). Anything else that does not fit is a ConfigError
    with the names, and then nothing was copied.
    """
    given = {name.removeprefix("module."): value for name, value in state.items()}
    own = model.state_dict()
    new_head = _other_classes(own, given)
    wanted = set(own) - (set(HEAD) if new_head else set())
    missing = {name for name in wanted - set(given) if not name.endswith("num_batches_tracked")}
    unknown = set(given) - set(own)
    other = {name for name in wanted & set(given) if own[name].shape != given[name].shape}
    if missing or unknown or other:
        raise ConfigError(_refusal(missing, unknown, other))
    model.load_state_dict(own | {name: given[name] for name in wanted & set(given)})
    note = f"{len(wanted & set(given))} tensors loaded"
    if new_head:
        note += f"; new head for {len(own['fc.bias'])} classes (the file has {len(given['fc.bias'])})"
    return note


def _other_classes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether the heads differ in the number of classes alone."""
    if not all(name in given for name in HEAD):
        return False
    same_features = own["fc.weight"].shape[1:] == given["fc.weight"].shape[1:]
    return same_features and own["fc.bias"].shape != given["fc.bias"].shape


def _refusal(missing: set[str], unknown: set[str], other: set[str]) -> str:
    parts = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (other, "of another shape"))
        if names
    ]
    return (
        f"the weights do not fit this net: {'; '.join(parts)}; set model.depth, shortcut, width and stem to the file's"
    )
