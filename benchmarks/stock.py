"""The peer of benchmarks.sweep: the same sweep as Ray's documentation shows it, and nothing of ours around the worker.

    RAY_ADDRESS=... python -m benchmarks.stock FLAGS

FLAGS are those of jobs.sweep with a grid. Ray Tune runs a function for each trial, which runs a TorchTrainer; each
epoch's metrics go with a checkpoint to Ray Train, through its TuneReportCallback to Tune, and from there through
MLflowLoggerCallback to MLflow. What trains is Skiplane's own worker: the same data, net, loader, steps and evaluation.
One thing is added, without which it hangs: see _wait_until_heard. With SKIPLANE_STOCK=tuned, trials poll and start as
Skiplane's do; otherwise as Ray does where nobody says so.
"""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from jobs import edge
from orchestrator import settings
from orchestrator.cluster.environment import for_driver, prepare
from orchestrator.config import RunConfig
from orchestrator.context import LocalContext, Record
from orchestrator.rhythm import Ask
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.settings import load
from orchestrator.sweep.space import Space
from orchestrator.worker import Job, Worker

ROOT = Path(__file__).parent.parent
TUNED = "SKIPLANE_STOCK"
METRICS = ("epoch", "time_ms", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5")


def main(argv: list[str]) -> int:
    """Exit codes: 0 finished, 1 a trial failed, 2 setting."""
    own = settings.parser("A sweep in Ray's stock way, to compare.", "python -m benchmarks.stock FLAGS")
    surroundings = settings.Edge.of_environment()
    _, config, sweep, space = load(argv, own, surroundings)
    prepare(surroundings.home)
    import ray

    # Ray's processes learn the address, too: what frees the place of a trial that was stopped looks for any cluster on
    # this machine, and where there are two it finds none, and the sweep waits for ever.
    variables = {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}
    shipped = {"working_dir": str(ROOT), "env_vars": variables}
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=shipped)
    results = _tuner(config, sweep, space, tuned=os.environ.get(TUNED) == "tuned").fit()
    ray.shutdown()
    return int(bool(results.num_errors))


def _tuner(config: RunConfig, sweep: SweepConfig, space: Space, tuned: bool) -> Any:
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    tracking = MLflowLoggerCallback(tracking_uri=config.tracking.uri, experiment_name=config.tracking.experiment)
    return tune.Tuner(
        # No CPU: those are for workers. Ray places nothing that asks for nothing.
        tune.with_resources(_trial(config, tuned), tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])),
        param_space={name: tune.grid_search(list(space.parts(name)[0].ends)) for name in space.dimensions},
        tune_config=tune.TuneConfig(
            metric="val_top1", mode="max", max_concurrent_trials=sweep.concurrent or None,
            scheduler=_scheduler(config, sweep),
        ),
        run_config=tune.RunConfig(name=config.name, storage_path=config.cluster.storage, callbacks=[tracking]),
    )  # fmt: skip


def _scheduler(config: RunConfig, sweep: SweepConfig) -> Any:
    """By the trial's own count of epochs: Tune's counts reports since a trial was started."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if sweep.stop == "none":
        return FIFOScheduler()
    return ASHAScheduler("epoch", max_t=config.train.epochs, grace_period=sweep.grace, reduction_factor=sweep.factor)


def _trial(config: RunConfig, tuned: bool) -> Callable[[dict[str, Any]], None]:
    def trial(point: dict[str, Any]) -> None:
        """What Tune runs for each trial, in a process of its own."""
        if tuned:
            for_driver()
        from ray import tune
        from ray.train import CheckpointConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        name = f"{config.name}-{tune.get_context().get_trial_id()}"
        TorchTrainer(
            _train,
            train_loop_config={"config": config.replace(point | {"name": name, "train.checkpoint_minutes": 0})},
            scaling_config=ScalingConfig(num_workers=config.cluster.span[1], resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=name, storage_path=f"{config.cluster.storage}/train", callbacks=[TuneReportCallback()],
                checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep),
            ),
        ).fit()  # fmt: skip
        _wait_until_heard(config.train.epochs)

    return trial


def _wait_until_heard(reports: int) -> None:
    """Ray 2.60 waits for ever where a trial's function returns while Tune has yet to fetch its last report: the note
    of the function's end takes the only place in the queue that the report has to pass. MLflow's requests, which Tune
    waits for after each result, make that likely."""
    from ray.train._internal.session import get_session

    passed = get_session().result_queue
    while passed.unfinished_tasks < reports or not passed.empty():  # Ray never marks one done: it counts them all
        time.sleep(0.02)


def _train(loop: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    from ray.train import get_context
    from ray.train.torch import get_device

    config, place = loop["config"], get_context()
    torch.set_num_threads(config.cluster.cpus_per_worker)
    context = LocalContext(place.get_world_rank(), place.get_world_size(), get_device())
    with ExitStack() as stack:
        Reporting(Job(config), context, stack).run()


class Reporting(Worker):
    """The worker, but metrics and state go to Ray Train, once an epoch."""

    def __init__(self, job: Job, context: LocalContext, stack: ExitStack) -> None:
        self._epoch: Record = {}
        context.hear = self._note
        super().__init__(job, context, stack)

    def _note(self, records: list[Record]) -> None:
        self._epoch = next((record for record in records if record["kind"] == "epoch"), self._epoch)

    def _keep(self, wanted: Ask) -> None:
        """Where ours would save a checkpoint."""
        from ray.train import Checkpoint, report

        self.tally.fetch()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.context.rank == 0:
                torch.save(self.step.state_dict(), Path(folder, "state.pt"))
                checkpoint = Checkpoint.from_directory(folder)
            report({name: self._epoch[name] for name in METRICS if name in self._epoch}, checkpoint=checkpoint)


if __name__ == "__main__":
    edge.run(main)
