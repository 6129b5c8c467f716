"""A group of DDP workers on Ray Train: a fixed number, no retries of Ray's own, one attempt.

`supervise` decides what comes after a failure. Workers speak to the driver through a small actor that lives beside it:
rank 0 moves when a group is started anew, the actor does not.
"""

import re
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.context import Record
from pipelines import errors
from pipelines.errors import SkiplaneError, TrainingError

# What a dead peer or a lost node never raises: trying again would only fail again.
BUGS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError, ValueError)
NODE_ID = "ray.io/node-id"  # the label that Ray gives every node
WorkerFunction = Callable[[Any, "RayContext"], dict[str, Any] | None]


class GroupDied(Exception):
    """A worker or its node is gone, or the group never started; trying again may help."""


@ray.remote(num_cpus=0)
class _Mailbox:
    """Records from the workers of one attempt, and the one word that the driver has for them."""

    def __init__(self) -> None:
        self._attempt, self._records, self._stop = -1, list[Record](), False

    def begin(self, attempt: int) -> None:
        self._attempt, self._records, self._stop = attempt, [], False

    def put(self, attempt: int, records: list[Record]) -> bool:
        """Whether to stop: always for workers of an attempt that is over, such as those of a node that was cut off."""
        if attempt != self._attempt:
            return True
        self._records += records
        return self._stop

    def drain(self) -> list[Record]:
        records, self._records = self._records, []
        return records

    def ask_stop(self) -> None:
        self._stop = True


class Mailbox:
    """The driver's end of the mailbox; it serves all attempts, one after the other."""

    def __init__(self) -> None:
        self._open()

    def begin(self, attempt: int) -> None:
        """Forgets what is there, and hears from now on the workers of this attempt alone."""
        self.attempt = attempt
        try:
            ray.get(self.actor.begin.remote(attempt))
        except RayError:  # lost: a new one
            self._open()
            ray.get(self.actor.begin.remote(attempt))

    def drain(self) -> list[Record]:
        """What came since the last call. Raises GroupDied where the mailbox is gone."""
        try:
            return list(ray.get(self.actor.drain.remote()))
        except RayError as error:
            raise GroupDied(f"the driver's mailbox is gone ({type(error).__name__})") from error

    def ask_stop(self) -> None:
        """Asks the workers for a checkpoint and an end."""
        with suppress(RayError):  # if the mailbox is gone, the next drain says so
            ray.get(self.actor.ask_stop.remote())

    def close(self) -> None:
        """Ends the actor's process."""
        with suppress(RayError, ValueError):
            ray.kill(self.actor)

    def _open(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        self.actor: Any = _Mailbox.options(  # type: ignore[attr-defined]
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
        ).remote()


class RayContext:
    """A worker's context under Ray Train. `poll_s`: how often it says where it is and asks whether to stop."""

    def __init__(self, actor: Any, attempt: int, poll_s: float = 0.2) -> None:
        place = ray.train.get_context()
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self.device = ray.train.torch.get_device()
        self.node = str(ray.get_runtime_context().get_node_id())
        first = self.rank - place.get_local_rank()  # Ray numbers the workers of a node one after the other
        self.node_ranks = range(first, first + place.get_local_world_size())
        self._actor, self._attempt, self._poll_s = actor, attempt, poll_s
        self._reply, self._asked_at, self._stop = None, 0.0, False

    def send(self, records: list[Record]) -> None:
        """One message without waiting for the answer (about 0.2 ms)."""
        self._reply, self._asked_at = self._actor.put.remote(self._attempt, records), time.monotonic()

    def stop_asked(self, step: int) -> bool:
        """The last answer from the driver; asks anew every poll_s."""
        if self._stop:
            return True
        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._stop, self._reply = ray.get(self._reply), None
        elif self._reply is None and time.monotonic() - self._asked_at > self._poll_s:
            self.send([{"kind": "at", "global_step": step}])
        return self._stop

    def introduce(self) -> None:
        """Tells the driver where this worker is, and by what it can be ended."""
        me = ray.get_runtime_context().current_actor
        self.send([{"kind": "worker", "rank": self.rank, "node": self.node, "actor": me}])

    def lose(self, cause: str) -> None:
        """Tells the driver that this worker cannot go on, though it lives: sooner than Ray ends the group."""
        record = {"kind": "lost", "rank": self.rank, "cause": cause}
        with suppress(RayError):
            ray.get(self._actor.put.remote(self._attempt, [record]), timeout=5)

    def fail(self, error: SkiplaneError) -> None:
        """Tells the driver why, and waits until it is told: the group dies right after."""
        record = {"kind": "error", "type": type(error).__name__, "message": str(error), "rank": self.rank}
        ray.get(self._actor.put.remote(self._attempt, [record]), timeout=10)


def _enter(config: dict[str, Any]) -> dict[str, Any] | None:
    """What Ray runs in each worker."""
    import logging

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    torch.set_num_threads(config["threads"])  # kernels split their sums by threads: the count is part of the bits
    context = RayContext(config["mailbox"], config["attempt"])
    context.introduce()
    try:
        return config["function"](config["job"], context)
    except SkiplaneError as error:
        context.fail(error)
        raise
    except BUGS as bug:
        context.fail(TrainingError(_where(bug)))
        raise
    except Exception as error:  # a lost peer, most likely
        context.lose(_line(error))
        raise


@dataclass(frozen=True)
class Size:
    """What a group asks for."""

    workers: int
    cpus: int
    gpus: int  # of one worker
    timeout_s: int
    interface: str | None = None  # the network interface that carries the nodes' addresses
    nodes: tuple[str, ...] = ()  # ids of those that may be used: no group waits for one that is lost; () = any


class Group:
    """One attempt at running `function(job, context)` on every worker; in a thread, so that signals stay with ours."""

    def __init__(self, function: WorkerFunction, job: Any, size: Size, mailbox: Mailbox, name: str) -> None:
        self._outcome: dict[str, Any] | None = None
        self._error: BaseException | None = None
        # Ray's own records go where nobody looks: unused, because one truth about 'latest' is enough.
        self._scratch = tempfile.mkdtemp(prefix="skiplane-ray-")
        self._trainer = _trainer(
            function,
            job,
            size,
            mailbox,
            RunConfig(
                name=name,
                storage_path=self._scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env=_environment(size.interface),
            ),
        )
        self._thread = threading.Thread(target=self._fit, name="fit", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it is over; waits at most so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def kill(self, workers: Iterable[Any]) -> None:
        """Ends it by its workers' actors, where Ray does not know yet that it cannot go on."""
        for actor in workers:
            with suppress(RayError, ValueError):
                ray.kill(actor)

    def outcome(self) -> dict[str, Any] | None:
        """What rank 0 returned. Raises GroupDied."""
        if self._error is not None:
            raise GroupDied(_cause(self._error)) from self._error
        return self._outcome

    def _fit(self) -> None:
        try:
            self._outcome = self._trainer.fit().return_value
        except Exception as error:
            self._error = error
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _where(bug: BaseException) -> str:
    """A bug as one sentence, with its place."""
    place = traceback.extract_tb(bug.__traceback__)[-1]
    return f"a worker raised {type(bug).__name__}: {bug} ({place.filename}:{place.lineno}); please report it"


def raise_error(record: Record) -> None:
    """Raises, in the driver, the SkiplaneError that a worker reported."""
    kind: type[SkiplaneError] = getattr(errors, record["type"])
    raise kind(record["message"])


def _trainer(function: WorkerFunction, job: Any, size: Size, mailbox: Mailbox, run: RunConfig) -> TorchTrainer:
    resources = {"CPU": size.cpus} | ({"GPU": size.gpus} if size.gpus else {})
    return TorchTrainer(
        _enter,
        train_loop_config={
            "function": function,
            "job": job,
            "mailbox": mailbox.actor,
            "attempt": mailbox.attempt,
            "threads": size.cpus,
        },
        scaling_config=ScalingConfig(
            num_workers=size.workers,
            use_gpu=bool(size.gpus),
            resources_per_worker=resources,
            label_selector={NODE_ID: f"in({','.join(size.nodes)})"} if size.nodes else None,
        ),
        torch_config=TorchConfig(backend="nccl" if size.gpus else "gloo", timeout_s=size.timeout_s),
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
            f"rank {rank}: {_line(cause)}" if rank >= 0 else _line(cause) for rank, cause in failures.items()
        )
    return _line(error)


def _line(error: BaseException) -> str:
    """In words of ours where the cause is known, else the last line of Ray's."""
    text = str(error)
    if "node was terminated" in text or "node has been marked dead" in text:
        return "its node is lost"
    if isinstance(error, RayActorError) or "worker process has died" in text:
        return "its process is gone (killed, out of memory, or its node is lost)"
    if re.search("closed by peer|connection reset|connection refused", text, re.IGNORECASE):
        return "lost its connection to another worker"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
