"""Whether torch may pick kernels whose sums depend on chance."""

import os

import torch


def deterministic(on: bool) -> None:
    """Ask torch for kernels that give the same bits each time (an error where there is none), or allow any.

    For this process, and before its first CUDA call: cuBLAS reads its workspace setting then. On a GPU it costs speed;
    on a CPU the kernels used here are deterministic anyway, at a fixed number of threads.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on
