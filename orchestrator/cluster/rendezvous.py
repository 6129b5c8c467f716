"""Where the workers of a group meet, opened to their own network alone.

torch's store listens on every interface, and asks nobody for a password: who reaches it while a group starts can lead
its gradients elsewhere. Here it listens on the address that Ray knows rank 0's node by. Gloo and NCCL keep to that
network too (group.py names its interface). Who is in the network still reaches all of them.
"""

import errno
import importlib
import ipaddress
import socket
from typing import Any

import torch.distributed
from ray.train.torch import TorchConfig

BACKLOG = 4096  # workers that call at the same moment


class Rendezvous(TorchConfig):
    """Ray's own settings of the process group, whose store listens on rank 0's address."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Before Ray makes the process group, with no hook for it in between."""
        worker_group.execute(narrow)
        super().on_start(worker_group, backend_config)


def narrow() -> None:
    """From now on a store that this process opens for others listens on the address that they are told."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # a function has the same name
    distributed: Any = torch.distributed

    def store(host_name: str, port: int, *, is_master: bool = False, **options: Any) -> Any:
        if is_master and (listener := _listener(host_name, port)):
            options["master_listen_fd"] = listener.detach()
        return distributed.TCPStore(host_name=host_name, port=port, is_master=is_master, **options)

    rendezvous.TCPStore = store


def _listener(address: str, port: int) -> socket.socket | None:
    """None where the address is none of this host's own, but translated on the way, or a name: then torch listens on
    all."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=BACKLOG)
    except ValueError:
        return None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise
