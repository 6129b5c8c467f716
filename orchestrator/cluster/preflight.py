"""Before a group starts: what every node can reach. Ray would find out at the first checkpoint, or never."""

import ipaddress
import platform
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.session import Node
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError


@dataclass(frozen=True)
class Report:
    """One node's answer."""

    address: str
    python: str
    torch: str
    interface: str | None  # that carries the node's address
    data: bool  # the dataset folder is there
    storage: bool  # what the driver wrote can be read


def preflight(nodes: list[Node], data_root: str, storage: Storage) -> str | None:
    """Asks every node that may get workers. Returns the network interface they share, if its name is the same.

    Raises ClusterError with the names of the nodes that cannot take part.
    """
    probe = f".preflight/{uuid.uuid4().hex}"
    storage.write(probe, b"skiplane")
    try:
        reports = _ask(nodes, data_root, storage.place, probe)
    finally:
        storage.remove(probe)
    _refuse("data.root", data_root, [r.address for r in reports if not r.data], "is not there")
    _refuse("cluster.storage", storage.place, [r.address for r in reports if not r.storage], "is not shared")
    for what in ("python", "torch"):
        if len(versions := {getattr(r, what) for r in reports}) > 1:
            pairs = ", ".join(f"{r.address}: {getattr(r, what)}" for r in reports)
            raise ClusterError(f"the nodes have {len(versions)} versions of {what} ({pairs}); install one everywhere")
    names = {r.interface for r in reports}
    return names.pop() if len(names) == 1 else None


def inspect(address: str, data_root: str, place: str, probe: str) -> Report:
    """What this node sees; runs on each."""
    seen = "://" in data_root or (Path(data_root) / "dataset.json").is_file()
    try:
        shared = Storage(place).read(probe) is not None
    except ClusterError:
        shared = False
    return Report(address, platform.python_version(), torch.__version__, interface_of(address), seen, shared)


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


def _ask(nodes: list[Node], data_root: str, place: str, probe: str) -> list[Report]:
    here = ray.get_runtime_context().get_node_id()
    remote = ray.remote(num_cpus=0)(inspect)
    pending = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n.id, soft=False)).remote(
            n.address, data_root, place, probe
        )
        for n in nodes
        if n.id != here
    ]
    own = [inspect(n.address, data_root, place, probe) for n in nodes if n.id == here]  # saves a process start
    try:
        return own + list(ray.get(pending, timeout=60))
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a node did not answer the preflight within 60 s: {type(error).__name__}; look at "
            f"`ray status`, then submit again"
        ) from error


def _refuse(setting: str, value: str, where: list[str], how: str) -> None:
    if where:
        raise ClusterError(
            f"{setting} {value} {how} on {', '.join(where)}; every node has to see the same folder or URL"
        )
