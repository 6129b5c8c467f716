"""Asking torch for deterministic kernels."""

import os

import pytest
import torch

from orchestrator.training.determinism import deterministic
from tests.small import make_step, run


@pytest.fixture
def restored(monkeypatch):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "left behind")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("way", ["fast", "exact"])
def test_a_step_needs_no_kernel_that_torch_calls_nondeterministic(way):
    deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    run(make_step(2, reduce=way), 0, 2, lanes=2)  # torch raises where a kernel has no deterministic form
    deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
