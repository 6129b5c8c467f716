"""The peer of benchmarks.recovery: Skiplane's worker under Ray Train's own elastic mode, and nothing of supervise.

    python -m benchmarks.elastic --recipe digits --name a --cluster.workers 1..2 [...]

Ray's controller notices, decides and restarts; each group goes on from the newest checkpoint in storage, as it would
from `ray.train.get_checkpoint()`. Prints the lines that jobs.train prints, so that one eye can read both. It never
ends by itself where its workers do not.
"""

import tempfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from typing import Any

from jobs import edge
from orchestrator import settings
from orchestrator.cluster.environment import prepare

RESIZE_S = 5.0  # between Ray's looks for more workers; 60 unless told otherwise


def main(argv: list[str]) -> int:
    """Exit codes: 0 finished, 5 Ray gave up."""
    own = settings.parser("Trains under Ray's elastic mode, to compare.", "python -m benchmarks.elastic ...")
    surroundings = settings.Edge.of_environment()
    _, config = settings.load(argv, own, surroundings)
    prepare(surroundings.home)
    from orchestrator.cluster.mailbox import Mailbox
    from orchestrator.cluster.member import packed
    from orchestrator.cluster.session import session
    from orchestrator.worker import Job

    with session(config.cluster.cpus), closing(Mailbox()) as mailbox:
        group = mailbox.muster()
        fit = threading.Thread(target=_trainer(config, mailbox, group).fit, daemon=True)
        fit.start()
        mailbox.give(group, packed(train, Job(config)))
        while fit.is_alive():
            records = mailbox.drain()
            _tell(records)
            if any(record["kind"] == "done" for record in records):
                mailbox.dismiss(group)
            fit.join(0.2)
    return 0


def _trainer(config: Any, mailbox: Any, group: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.cluster.member import enter

    return TorchTrainer(
        enter,
        train_loop_config={"mailbox": mailbox.actor, "group": group, "threads": 1},
        scaling_config=ScalingConfig(
            num_workers=config.cluster.span,
            resources_per_worker={"CPU": 1},
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        torch_config=TorchConfig(backend="gloo", timeout_s=config.cluster.timeout_seconds),
        run_config=RunConfig(
            name=config.name,
            storage_path=tempfile.mkdtemp(prefix="skiplane-elastic-"),
            failure_config=FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": "eth0"}},
        ),
    )


def train(job: Any, context: Any) -> Any:
    """What each worker does: the newest checkpoint as rank 0 finds it, then the product's own worker."""
    import torch.distributed as dist

    from orchestrator import worker
    from orchestrator.state.checkpoints import Checkpoints
    from orchestrator.state.storage import Storage

    found = Checkpoints(Storage(job.config.folder()), job.config.train.keep).names()
    names = [found[-1] if found else None]
    if context.world_size > 1:
        dist.broadcast_object_list(names)
    return worker.train(replace(job, resume=names[0]), context)


def _tell(records: list[dict[str, Any]]) -> None:
    from orchestrator.progress import progress_line

    for record in records:
        if record["kind"] == "progress":
            edge.say(progress_line(record))
        elif record["kind"] == "restored":
            edge.say(f"resumed at step {record['global_step']} after {time.monotonic():.1f} s")


if __name__ == "__main__":
    edge.run(main)
