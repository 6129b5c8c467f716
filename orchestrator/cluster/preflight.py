"""Before a group starts: what every node can reach. Ray would find out at the first checkpoint, or never."""

import ipaddress
import platform
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.session import Node
from orchestrator.config import RunConfig
from orchestrator.feed import open_cache
from orchestrator.state.storage import Storage
from pipelines.dataset import MANIFEST, Dataset
from pipelines.errors import ClusterError, ConfigError, DataError
from pipelines.remote.objects import Objects
from pipelines.remote.patience import Patience

LOOK_S = 5.0  # that a node tries to reach something


@dataclass(frozen=True)
class Question:
    """What every node is asked to reach."""

    address: str  # the node's own
    places: tuple[str, ...]  # one object of each client that the data needs, the manifest among them
    endpoint: str
    config: RunConfig | None  # whose cache is to be opened; None where nothing is streamed
    storage: str
    probe: str  # what the driver wrote there


@dataclass(frozen=True)
class Report:
    """One node's answer; `data`, `cache` and `storage` say what is wrong with them, or nothing."""

    address: str
    python: str
    torch: str
    interface: str | None  # that carries the node's address
    data: str
    cache: str
    storage: str


def preflight(nodes: list[Node], config: RunConfig, dataset: Dataset, storage: Storage) -> list[Report]:
    """Asks every node that may get workers; their answers.

    Raises ClusterError with the names of the nodes that cannot take part, and why.
    """
    probe = f".preflight/{uuid.uuid4().hex}"
    places = (dataset.locate(MANIFEST), *dataset.probes())
    cached = config if dataset.streamed else None
    question = Question("", places, config.data.endpoint, cached, storage.place, probe)
    storage.write(probe, b"skiplane")
    try:
        reports = _ask(nodes, question)
    finally:
        storage.remove(probe)
    _refuse("data.root", {r.address: r.data for r in reports}, EVERYWHERE)
    _refuse("data.cache", {r.address: r.cache for r in reports}, "it has to be a folder that every node can write")
    _refuse("cluster.storage", {r.address: r.storage for r in reports}, EVERYWHERE)
    for what in ("python", "torch"):
        if len(versions := {getattr(r, what) for r in reports}) > 1:
            pairs = ", ".join(f"{r.address}: {getattr(r, what)}" for r in reports)
            raise ClusterError(f"the nodes have {len(versions)} versions of {what} ({pairs}); install one everywhere")
    return reports


EVERYWHERE = "every node has to see the same folder or URL, with credentials in the environment of its `ray start`"


def inspect(question: Question) -> Report:
    """What this node sees; runs on each."""
    return Report(
        question.address,
        platform.python_version(),
        torch.__version__,
        interface_of(question.address),
        _data_fault(question),
        _cache_fault(question.config),
        _storage_fault(question),
    )


def _data_fault(question: Question) -> str:
    objects = Objects(question.endpoint, Patience(LOOK_S))
    try:
        for place in question.places:
            objects.touch(place)
    except DataError as error:
        return str(error)
    return ""


def _cache_fault(config: RunConfig | None) -> str:
    try:
        if config:
            open_cache(config)
    except ConfigError as error:
        return str(error)
    return ""


def _storage_fault(question: Question) -> str:
    try:
        found = Storage(question.storage).read(question.probe)
    except ClusterError as error:
        return str(error)
    return "" if found is not None else f"{question.storage} is not shared: what the driver wrote there is not there"


def interface_of(address: str) -> str | None:
    """The network interface whose own address this is, or whose loopback network it is in."""
    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for own in addresses:
            if own.family == socket.AF_INET and own.netmask:
                interface = ipaddress.ip_interface(f"{own.address}/{own.netmask}")
                if wanted == interface.ip or (wanted.is_loopback and wanted in interface.network):
                    return str(name)
    return None


def _ask(nodes: list[Node], question: Question) -> list[Report]:
    here = ray.get_runtime_context().get_node_id()
    remote = ray.remote(num_cpus=0)(inspect)
    pending = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n.id, soft=False)).remote(
            replace(question, address=n.address)
        )
        for n in nodes
        if n.id != here
    ]
    own = [inspect(replace(question, address=n.address)) for n in nodes if n.id == here]  # saves a process start
    try:
        return own + list(ray.get(pending, timeout=60))
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a node did not answer the preflight within 60 s: {type(error).__name__}; look at "
            f"`ray status`, then submit again"
        ) from error


def _refuse(setting: str, faults: Mapping[str, str], how: str) -> None:
    """faults: node -> what is wrong there. Nodes with the same fault are told together."""
    told = {fault: [node for node, other in faults.items() if other == fault] for fault in faults.values() if fault}
    if told:
        where = "; ".join(f"on {', '.join(nodes)}: {fault}" for fault, nodes in told.items())
        raise ClusterError(f"{setting} cannot be used {where}; {how}")
