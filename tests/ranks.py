"""Several gloo processes on this machine, for tests of what happens between ranks."""

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.nn.parallel"])  # imported once, not once a rank


def on_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """work(rank, world_size, *args) on each rank, with a process group where there are several; results by rank.

    `work` is a function of a module; it and its results are pickled. With one rank it still runs in its own process.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            _context.Process(target=_rank, args=(rank, world_size, f"{folder}/meet", send, work, args), daemon=True)
            for rank, (_, send) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, send in pipes:
            send.close()
        try:
            return [_receive(receive, rank) for rank, (receive, _) in enumerate(pipes)]
        finally:
            for process in ranks:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _receive(receive: Connection, rank: int) -> Any:
    assert receive.poll(TIMEOUT_S), f"rank {rank} did not finish within {TIMEOUT_S} s"
    return receive.recv()  # EOFError: the rank died, its traceback is in the captured stderr


def _rank(rank: int, world_size: int, meet: str, send: Connection, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in the tests' own process
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world_size > 1:
        dist.init_process_group("gloo", init_method=Path(meet).as_uri(), rank=rank, world_size=world_size)
    try:
        send.send(work(rank, world_size, *args))
    finally:
        if world_size > 1:
            dist.destroy_process_group()
