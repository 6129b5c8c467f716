"""What Ray runs in each worker: one piece of work after the other, as the driver's mailbox has them."""

import gc
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError

from orchestrator.cluster import metering
from orchestrator.context import Record
from pipelines.errors import SkiplaneError, TrainingError

# What a dead peer or a lost node never raises: trying again would only fail again.
BUGS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError, ValueError)
LOOK_S = 0.1  # between an idle worker's questions
Function = Callable[[Any, "RayContext"], dict[str, Any] | None]


def packed(function: Function, job: Any) -> bytes:
    """Work as it lies in the mailbox, which imports nothing for it: `function(job, context)`, on every worker."""
    return bytes(cloudpickle.dumps((function, job)))


def enter(config: dict[str, Any]) -> None:
    """Works until it is sent home. config: mailbox (the actor), group (its number there), threads (of torch).

    What a process keeps must not reach the next work's bits: threads are the group's, everything else the function
    sets itself, and what torch keeps of nets that are gone is dropped. An error ends the worker, and Ray the group.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    torch.set_num_threads(config["threads"])  # kernels split their sums by threads: the count is part of the bits
    number = 0
    while given := _next(config["mailbox"], config["group"], number):
        number, work = given
        _do(work, RayContext(config["mailbox"], number))
        _tidy()


def _next(mailbox: Any, group: int, after: int) -> tuple[int, bytes] | None:
    """Waits for the next work; None where there will be none: also where driver and mailbox are gone."""
    while True:
        try:
            answer = ray.get(mailbox.next.remote(group, after))
        except RayError:
            return None
        if not isinstance(answer, bool):
            number, work = answer
            return number, work
        if not answer:
            return None
        time.sleep(LOOK_S)


def _do(work: bytes, context: "RayContext") -> None:
    context.introduce()
    try:
        function, job = cloudpickle.loads(work)
        context.finish(function(job, context))
    except SkiplaneError as error:
        context.fail(error)
        raise
    except BUGS as bug:
        context.fail(TrainingError(_where(bug)))
        raise
    except Exception as error:  # a lost peer, most likely
        context.lose(line(error))
        raise


def _tidy() -> None:
    """After a work: memory for the next one, which may be another net, and no compiled code of this one."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class RayContext:
    """A worker's context under Ray Train, for one piece of work, which has a number in the mailbox.

    `poll_s`: how often it says where it is and asks whether to stop.
    """

    def __init__(self, actor: Any, number: int, poll_s: float = 0.2) -> None:
        place = ray.train.get_context()
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self.device = ray.train.torch.get_device()
        self.node = str(ray.get_runtime_context().get_node_id())
        first = self.rank - place.get_local_rank()  # Ray numbers the workers of a node one after the other
        self.node_ranks = range(first, first + place.get_local_world_size())
        self._actor, self._number, self._poll_s = actor, number, poll_s
        self._reply, self._asked_at, self._stop = None, 0.0, False

    def send(self, records: list[Record]) -> None:
        """One message without waiting for the answer (about 0.2 ms)."""
        self._reply, self._asked_at = self._actor.put.remote(self._number, records), time.monotonic()

    def count(self, run: str, amounts: Mapping[str, float]) -> None:
        """Into Ray's metrics: about 2 us each. Workers go from run to run, so the run is a label of each count."""
        metering.count({"run": run, "rank": str(self.rank)}, amounts)

    def stop_asked(self, step: int) -> bool:
        """The last answer from the driver; asks anew every poll_s."""
        if self._stop:
            return True
        reply = self._reply  # other threads send, too
        if reply is not None and ray.wait([reply], timeout=0)[0]:
            self._stop, self._reply = ray.get(reply), None
        elif reply is None and time.monotonic() - self._asked_at > self._poll_s:
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
            ray.get(self._actor.put.remote(self._number, [record]), timeout=5)

    def finish(self, outcome: dict[str, Any] | None) -> None:
        """Tells the driver that this worker is done and waits for more; of what came out, rank 0's counts."""
        self.send([{"kind": "done", "rank": self.rank, "outcome": outcome if self.rank == 0 else None}])

    def fail(self, error: SkiplaneError) -> None:
        """Tells the driver why, and waits until it is told: the group dies right after."""
        record = {"kind": "error", "type": type(error).__name__, "message": str(error), "rank": self.rank}
        ray.get(self._actor.put.remote(self._number, [record]), timeout=10)


def _where(bug: BaseException) -> str:
    """A bug as one sentence, with its place."""
    place = traceback.extract_tb(bug.__traceback__)[-1]
    return f"a worker raised {type(bug).__name__}: {bug} ({place.filename}:{place.lineno}); please report it"


def line(error: BaseException) -> str:
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
