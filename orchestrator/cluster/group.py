"""A group of DDP workers on Ray Train: a fixed number, no retries of Ray's own, one piece of work after the other.

`supervise` decides what comes after a failure, which ends the group. Starting one takes ten seconds and more.
"""

import shutil
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from orchestrator.cluster.cleaner import Trainer
from orchestrator.cluster.mailbox import GroupDied, Mailbox
from orchestrator.cluster.member import Function, enter, line, packed
from orchestrator.cluster.rendezvous import Rendezvous
from orchestrator.context import Record
from pipelines import errors
from pipelines.errors import SkiplaneError

NODE_ID = "ray.io/node-id"  # the label that Ray gives every node


@dataclass(frozen=True)
class Size:
    """What a group asks for."""

    workers: int
    cpus: int
    gpus: int  # of one worker
    timeout_s: int
    interface: str | None = None  # the network interface that carries the nodes' addresses
    nodes: tuple[str, ...] = ()  # ids of those that may be used: no group waits for one that is lost; () = any
    deterministic: bool = True  # on GPUs: cuBLAS reads once in a process how it is to sum


class Group:
    """Workers that run `function(job, context)` as often as they are given one; in a thread: signals stay with ours."""

    def __init__(self, size: Size, mailbox: Mailbox, name: str) -> None:
        self.size, self.works = size, 0  # works: pieces of work that it was given
        self._number, self._mailbox = mailbox.muster(), mailbox
        self._workers: dict[int, tuple[str, Any]] = {}  # rank -> node id, actor; as far as they are known
        self._done: dict[int, dict[str, Any] | None] = {}  # rank -> what the work came to
        self._error: BaseException | None = None
        # Ray's own records go where nobody looks: unused, because one truth about 'latest' is enough.
        self._scratch = tempfile.mkdtemp(prefix="skiplane-ray-")
        run = RunConfig(
            name=name,
            storage_path=self._scratch,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env=_environment(size.interface),
        )
        self._trainer = _trainer(size, {"mailbox": mailbox.actor, "group": self._number, "threads": size.cpus}, run)
        self._thread = threading.Thread(target=self._fit, name="fit", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether all workers are done with what they were given, and wait."""
        return len(self._done) == self.size.workers

    @property
    def nodes(self) -> Counter[str]:
        """Node id -> workers there."""
        return Counter(node for node, _ in self._workers.values())

    def give(self, function: Function, job: Any) -> bool:
        """Work for all workers. False where they are gone or went home meanwhile."""
        self._done, self.works = {}, self.works + 1
        return not self.wait(0) and self._mailbox.give(self._number, packed(function, job))

    def hear(self) -> list[Record]:
        """What the workers said since the last call. Raises GroupDied where the mailbox is gone."""
        records = self._mailbox.drain()
        for record in records:
            if record["kind"] == "worker":
                self._workers[record["rank"]] = record["node"], record["actor"]
            elif record["kind"] == "done":
                self._done[record["rank"]] = record["outcome"]
        return records

    def ask_stop(self) -> None:
        """Asks the workers for a checkpoint and an end of what they do."""
        self._mailbox.ask_stop()

    def rest(self, seconds: float) -> bool:
        """It may wait so long for work, then it ends; to be said again where it is kept. False where it has ended."""
        return not self.wait(0) and self._mailbox.rest(self._number, seconds)

    def dismiss(self) -> None:
        """It is to end: at once, or when its workers have saved what they do."""
        self._mailbox.dismiss(self._number)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended; waits at most so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def kill(self) -> None:
        """Ends it by its workers' actors, where Ray does not know yet that it cannot go on."""
        for _, actor in self._workers.values():
            with suppress(RayError, ValueError):
                ray.kill(actor)

    def outcome(self) -> dict[str, Any]:
        """What rank 0's work came to. Raises GroupDied where the group ended before all were done."""
        if self.done:
            return self._done[0] or {}
        raise GroupDied(_cause(self._error) if self._error else "its workers ended") from self._error

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self._error = error
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)


def raise_error(record: Record) -> None:
    """Raises, in the driver, the SkiplaneError that a worker reported."""
    kind: type[SkiplaneError] = getattr(errors, record["type"])
    raise kind(record["message"])


def _trainer(size: Size, told: dict[str, Any], run: RunConfig) -> Trainer:
    resources = {"CPU": size.cpus} | ({"GPU": size.gpus} if size.gpus else {})
    return Trainer(
        enter,
        train_loop_config=told,
        scaling_config=ScalingConfig(
            num_workers=size.workers,
            use_gpu=bool(size.gpus),
            resources_per_worker=resources,
            label_selector={NODE_ID: f"in({','.join(size.nodes)})"} if size.nodes else None,
        ),
        torch_config=Rendezvous(backend="nccl" if size.gpus else "gloo", timeout_s=size.timeout_s),
        run_config=run,
    )


def _environment(interface: str | None) -> dict[str, dict[str, str]] | None:
    """Debian's '127.0.1.1 hostname' line sends gloo to the wrong interface: name the right one."""
    if interface is None:
        return None
    return {"env_vars": {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}}


def _cause(error: BaseException) -> str:
    """The first telling line of what Ray raised."""
    if isinstance(error, TrainingFailedError):
        failures = getattr(error, "worker_failures", None) or {-1: getattr(error, "controller_failure", error)}
        return "; ".join(
            f"rank {rank}: {line(cause)}" if rank >= 0 else line(cause) for rank, cause in failures.items()
        )
    return line(error)
