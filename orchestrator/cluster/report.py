"""What one node sees of the data, the storage and itself: asked by the preflight, answered on the node."""

import ipaddress
import platform
import socket
import time
import uuid
from dataclasses import dataclass
from functools import cache
from typing import Self

import psutil
import torch

from orchestrator import provenance
from orchestrator.config import RunConfig
from orchestrator.feed import open_cache
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError, ConfigError, DataError
from pipelines.remote.objects import Objects
from pipelines.remote.patience import Patience

LOOK_S = 5.0  # that a node tries to reach something
PROBES = ".preflight"  # small objects of the driver and the nodes; each removes its own


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
class Software:
    """Versions that decide what is computed."""

    python: str
    torch: str  # with its build, such as 2.13.0+cpu
    skiplane: str  # sha256 of the code, as MLflow's tag skiplane.package_sha256 has it

    @classmethod
    @cache
    def here(cls) -> Self:
        """Of this process; the code is hashed once, so that files that change later do not count."""
        return cls(platform.python_version(), torch.__version__, provenance.content_sha256())


@dataclass(frozen=True)
class Report:
    """One node's answer; `data`, `cache` and `storage` say what is wrong with them, or nothing."""

    address: str
    software: Software
    interface: str | None  # that carries the node's address
    data: str
    cache: str
    storage: str
    clock: float  # seconds of the epoch, looked at last


def inspect(question: Question) -> Report:
    """What this node sees; runs on each."""
    return Report(
        question.address,
        Software.here(),
        interface_of(question.address),
        _data_fault(question),
        _cache_fault(question.config),
        _storage_fault(question),
        time.time(),
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
    """It is the driver's, and can be written."""
    storage, own = Storage(question.storage, LOOK_S, 2 * LOOK_S), f"{PROBES}/{uuid.uuid4().hex}"
    try:
        if storage.read(question.probe) is None:
            return f"{question.storage} is not shared: what the driver wrote there is not there"
        storage.write(own, b"skiplane")
        storage.remove(own)
    except ClusterError as error:
        return str(error).removeprefix("cluster.storage: ")
    return ""


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
