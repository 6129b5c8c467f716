"""What a step costs beside plain DDP with one forward pass, on the same tensors.

    python -m benchmarks.step [--quick] [--json FILE]

Every rank holds one batch of uint8 images. "plain" is what one writes by hand: torch's BatchNorm, DDP, one forward and
backward, SGD. The others are this project's loop and step on the same bytes: one lane a rank, four lanes fused in one
pass, four one by one, and the two other ways of summing. All take turns, round after round, so that a noisy machine is
noisy for all; ratios are taken within a round, and their median and quartiles are printed. Wall-clock is rank 0's, CPU
time is that of all its threads.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from orchestrator.training.loop import train
from orchestrator.training.models.arch import Arch
from orchestrator.training.models.resnet import build
from orchestrator.training.norm import LaneBatchNorm2d
from orchestrator.training.pixels import IMAGENET_MEAN, IMAGENET_STD
from orchestrator.training.reduce import Way
from orchestrator.training.schedule import constant
from orchestrator.training.step import TrainStep

LANES = 4  # of a rank, where there are several
LR = 1e-3  # small: the numbers must stay finite, what they are does not matter
VARIANTS: dict[str, tuple[int, int, Way]] = {  # name -> lanes of a rank, lanes a pass, way of summing
    "one lane": (1, 0, "fast"),
    "four lanes, fused": (LANES, 0, "fast"),
    "four lanes, one by one": (LANES, 1, "fast"),
    "four lanes, fused, ordered sum": (LANES, 0, "ordered"),
    "four lanes, exact sum": (LANES, 0, "exact"),
}
TARGETS = {"one lane": 1.02, "four lanes, fused": 1.10}  # of plain, on a CPU


@dataclass(frozen=True)
class Setting:
    depth: int = 18
    width: int = 64
    size: int = 64  # px
    batch: int = 32  # of a rank
    workers: int = 2
    threads: int = 1  # of a rank
    rounds: int = 15
    steps: int = 2  # of each variant in a round
    precision: str = "fp32"

    @property
    def title(self) -> str:
        """What is measured, for a table."""
        return (
            f"ResNet-{self.depth}, width {self.width}, {self.size} px, batch {self.batch} a rank, "
            f"{self.workers} ranks of {self.threads} thread(s), {self.precision}, {self.rounds} rounds"
        )


QUICK = {"width": 16, "size": 16, "batch": 64, "rounds": 5, "steps": 5}


@dataclass
class Batch:
    """The same tensors at every step."""

    images: Tensor
    labels: Tensor
    epoch: int = 0
    step: int = 0
    digest: int = 0
    bad: tuple[object, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    setting, file = _settings(argv)
    timings = measure(setting)
    rows = {name: compared(values, timings["plain"]) for name, values in timings.items()}
    _print(rows, setting)
    if file:
        result = {"setting": asdict(setting), "torch": torch.__version__, "variants": rows}
        file.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _settings(argv: Sequence[str] | None) -> tuple[Setting, Path | None]:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=(__doc__ or "").partition("\n")[0])
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=type(value), default=None, help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help=f"small: {QUICK}")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    given = vars(parser.parse_args(argv))
    file, quick = given.pop("json"), given.pop("quick")
    chosen = {name: value for name, value in given.items() if value is not None}
    setting = Setting(**((QUICK if quick else {}) | chosen))
    if setting.batch % LANES:
        parser.error(f"--batch is {setting.batch}; it must be a multiple of {LANES}, for as many lanes")
    return setting, file


def measure(setting: Setting) -> dict[str, list[tuple[float, float]]]:
    """For each variant, (wall, CPU) seconds a step on rank 0, round by round."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: SimpleQueue[dict[str, list[tuple[float, float]]]] = context.SimpleQueue()
        args = [(rank, setting, f"{folder}/meet", results) for rank in range(setting.workers)]
        ranks = [context.Process(target=_rank, args=arg, daemon=True) for arg in args]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("error: a rank failed; its traceback is above")
        return results.get()


def _rank(rank: int, setting: Setting, meet: str, results: "SimpleQueue[dict[str, list[tuple[float, float]]]]") -> None:
    torch.set_num_threads(setting.threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    world = setting.workers
    dist.init_process_group("gloo", init_method=Path(meet).as_uri(), rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(rank)
    shape = (setting.batch, setting.size, setting.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    batch = Batch(images, torch.randint(0, 1000, (setting.batch,), generator=generator))
    runs = {"plain": _plain(setting, batch)} | {name: _ours(setting, batch, *how) for name, how in VARIANTS.items()}
    timings = _take_turns(runs, setting)
    if rank == 0:
        results.put(timings)
    dist.destroy_process_group()


def _take_turns(runs: dict[str, Callable[[], None]], setting: Setting) -> dict[str, list[tuple[float, float]]]:
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(-1, setting.rounds):  # the first round warms up and is not counted
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(setting.steps):
                runs[name]()
            took = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= 0:
                timings[name].append((took[0] / setting.steps, took[1] / setting.steps))
    return timings


def _net(setting: Setting) -> nn.Module:
    return build(Arch(depth=setting.depth, width=setting.width, stem="small" if setting.size < 64 else "imagenet"), 0)


def _plain(setting: Setting, batch: Batch) -> Callable[[], None]:
    """A training step as one writes it by hand."""
    net = _net(setting)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LaneBatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4, fused=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def step() -> None:
        x = batch.images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std).contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
            logits = model(x)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits.float(), batch.labels))
        optimizer.step()

    return step


def _ours(setting: Setting, batch: Batch, lanes: int, per_pass: int, way: Way) -> Callable[[], None]:
    """One turn of the loop, over the same batch for ever."""
    step = TrainStep(
        _net(setting),
        lanes=lanes,
        total_lanes=lanes * setting.workers,
        micro_batch=setting.batch // lanes,
        lanes_per_pass=per_pass,
        world_size=setting.workers,
        reduce=way,
        precision="bf16" if setting.precision == "bf16" else "fp32",
    )
    turns = (setting.rounds + 1) * setting.steps
    batches = (Batch(batch.images, batch.labels, step=i) for i in range(turns))
    steps = train(step, batches, constant(LR, turns), steps_per_epoch=turns, start=0, stop=turns)
    return lambda: cast(None, next(steps))


def compared(values: list[tuple[float, float]], plain: list[tuple[float, float]]) -> dict[str, float]:
    """Medians in ms, and the ratio to `plain` within a round with its quartiles, of wall-clock and of CPU time."""
    row: dict[str, float] = {}
    for i, kind in enumerate(("wall", "cpu")):
        ratios = [value[i] / base[i] for value, base in zip(values, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row |= {f"{kind}_ms": 1000 * statistics.median(value[i] for value in values)}
        row |= {f"{kind}_ratio": middle, f"{kind}_ratio_low": low, f"{kind}_ratio_high": high}
    return row


def cells(row: dict[str, float]) -> list[str]:
    """Of a table, from `compared`: ms and ratio of wall-clock, ms and ratio of CPU time."""
    found = []
    for kind in ("wall", "cpu"):
        spread = f"{row[f'{kind}_ratio_low']:.3f}–{row[f'{kind}_ratio_high']:.3f}"
        found += [f"{row[f'{kind}_ms']:.1f}", f"{row[f'{kind}_ratio']:.3f} ({spread})"]
    return found


def _print(rows: dict[str, dict[str, float]], setting: Setting) -> None:
    table = Table(title=setting.title, caption="ratio to plain within a round: median (quartiles)")
    for heading in ("", "wall ms/step", "to plain", "CPU ms/step", "to plain", "target"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, row in rows.items():
        table.add_row(name, *cells(row), f"{TARGETS[name]:.2f}" if name in TARGETS else "")
    Console(width=120).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
