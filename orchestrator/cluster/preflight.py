"""Before a group starts: what every node can reach, and whether it has the driver's software and time.

Ray would find out at the first checkpoint, or never.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.report import PROBES, Question, Report, Software, inspect
from orchestrator.cluster.session import Node
from orchestrator.config import RunConfig
from orchestrator.state.space import check_space
from orchestrator.state.storage import Storage
from orchestrator.training.models import cost
from pipelines.dataset import MANIFEST, Dataset
from pipelines.errors import ClusterError, ConfigError, SkiplaneError

ANSWER_S = 60.0  # that all nodes have, the start of a process included
APART_S = 30.0  # that a node's clock may be off: MLflow's curves and the signatures of object stores need it


@dataclass(frozen=True)
class Answer:
    """A report, and when it was asked for and had, by the driver's clock (seconds of the epoch)."""

    report: Report
    asked: float
    had: float

    @property
    def ahead_s(self) -> float:
        """How far the node's clock is ahead of the driver's, at least; 0 where it may be right."""
        clock = self.report.clock
        return max(clock - self.had, 0.0) + min(clock - self.asked, 0.0)


def preflight(
    nodes: Sequence[Node], config: RunConfig, dataset: Dataset, storage: Storage, space: bool = True
) -> list[Report]:
    """Asks every node that may get workers; their answers. space: also whether the storage has room for checkpoints.

    Raises ClusterError with the names of the nodes that cannot take part, and why, or where the storage has no space
    for checkpoints; ConfigError for the cache.
    """
    probe = f"{PROBES}/{uuid.uuid4().hex}"
    places = (dataset.locate(MANIFEST), *dataset.probes())
    cached = config if dataset.streamed else None
    storage.write(probe, b"skiplane")
    try:
        answers = _ask(nodes, Question("", places, config.data.endpoint, cached, storage.place, probe))
    finally:
        storage.remove(probe)
    judge(Software.here(), answers)
    if space:
        check_space(storage, cost.parameters(config.model.arch(len(dataset.classes))), config.train.keep)
    return [answer.report for answer in answers]


def judge(driver: Software, answers: Sequence[Answer]) -> None:
    """Raises what is wrong with the nodes; `driver`: what it runs itself, on a node that may get no workers."""
    reports = [answer.report for answer in answers]
    check_software(driver, reports)
    check_clocks(answers)
    _refuse("data.root", {r.address: r.data for r in reports}, EVERYWHERE)
    _refuse("data.cache", {r.address: r.cache for r in reports}, OWN_FOLDER, ConfigError)
    _refuse("cluster.storage", {r.address: r.storage for r in reports}, EVERYWHERE)


EVERYWHERE = (
    "every node has to see the same folder or URL, and may write cluster.storage; with credentials in the environment "
    "of its `ray start`"
)
OWN_FOLDER = "it has to be a folder that every node can write"


def check_software(driver: Software, reports: Sequence[Report]) -> None:
    """Python, torch and the code are the driver's. Of torch's builds (+cpu, +cu130) the nodes have one; a driver that
    gets no workers may have another."""
    for noun, of, cure in SOFTWARE:
        others = {r.address: of(r.software) for r in reports if of(r.software) != of(driver)}
        if others:
            raise ClusterError(f"{noun} is {_where(others)}, and {of(driver)} in the driver; {cure}")
    builds = {r.address: r.software.torch for r in reports}
    if len(set(builds.values())) > 1:
        raise ClusterError(f"torch is {_where(builds)}; install one build on all nodes")


INSTALL = "install the driver's version there"
SOFTWARE: tuple[tuple[str, Callable[[Software], str], str], ...] = (  # what, of a node, what to do
    ("Python", lambda software: software.python, INSTALL),
    ("torch", lambda software: software.torch.partition("+")[0], INSTALL),
    (
        "Skiplane",
        lambda software: software.skiplane[:8],
        "the code differs (sha256): take other copies of Skiplane out of the site-packages and the PYTHONPATH of those "
        "nodes, or submit from the copy that they have",
    ),
)


def check_clocks(answers: Sequence[Answer]) -> None:
    """No clock is farther than APART_S from the driver's, allowing for the time that the question took."""
    off = [f"{a.report.address} is {_off(a.ahead_s)} the driver" for a in answers if abs(a.ahead_s) > APART_S]
    if off:
        raise ClusterError(
            f"clocks are more than {APART_S:.0f} s apart: {', '.join(off)}; set them right with NTP (chrony, "
            f"systemd-timesyncd), then submit again"
        )


def _off(ahead_s: float) -> str:
    return f"{abs(ahead_s):,.0f} s {'ahead of' if ahead_s > 0 else 'behind'}"


def _refuse(setting: str, faults: Mapping[str, str], how: str, kind: type[SkiplaneError] = ClusterError) -> None:
    """faults: node -> what is wrong there. Nodes with the same fault are told together."""
    told = {node: fault for node, fault in faults.items() if fault}
    if told:
        where = "; ".join(f"on {', '.join(nodes)}: {fault}" for fault, nodes in _grouped(told).items())
        raise kind(f"{setting} cannot be used {where}; {how}")


def _where(values: Mapping[str, str]) -> str:
    """{"a": "1", "b": "2", "c": "1"} -> "1 on a, c, 2 on b"."""
    return ", ".join(f"{value} on {', '.join(nodes)}" for value, nodes in _grouped(values).items())


def _grouped(values: Mapping[str, str]) -> dict[str, list[str]]:
    """{node: value} -> {value: its nodes}."""
    return {value: [node for node, other in values.items() if other == value] for value in values.values()}


def _ask(nodes: Sequence[Node], question: Question) -> list[Answer]:
    """In the order of the nodes. The driver's own node answers in the driver, which saves the start of a process."""
    here, remote, asked = ray.get_runtime_context().get_node_id(), ray.remote(num_cpus=0)(inspect), time.time()
    pending = {
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n.id, soft=False)).remote(
            replace(question, address=n.address)
        ): n
        for n in nodes
        if n.id != here
    }
    own = [n for n in nodes if n.id == here]
    answers = {n.id: Answer(inspect(replace(question, address=n.address)), asked, time.time()) for n in own}
    limit = time.monotonic() + ANSWER_S
    while pending:
        ready, _ = ray.wait(list(pending), timeout=max(0.0, limit - time.monotonic()))
        if not ready:
            raise _silent(pending.values(), f"within {ANSWER_S:.0f} s")
        node = pending.pop(ready[0])
        try:
            answers[node.id] = Answer(ray.get(ready[0]), asked, time.time())
        except ray.exceptions.RayError as error:
            raise _silent([node], str(error).strip().splitlines()[-1]) from error
    return [answers[node.id] for node in nodes]


def _silent(nodes: Iterable[Node], why: str) -> ClusterError:
    return ClusterError(
        f"the preflight had no answer from {', '.join(n.address for n in nodes)} ({why}); look at `ray status` and at "
        f"the logs there, then submit again"
    )
