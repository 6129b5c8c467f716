"""Where workers meet: torch's store listens on the address that they are told, and on no other."""

import socket
import subprocess
import sys

import pytest

from orchestrator.cluster.rendezvous import _listener
from tests.machines import ROOT

# $1: whether it is narrowed. Prints the addresses that this process listens on while it is in a group of one.
LISTENS = """
import sys
import psutil
import torch.distributed as distributed
from orchestrator.cluster.rendezvous import narrow
if sys.argv[1] == "narrow":
    narrow()
    narrow()
distributed.init_process_group("gloo", init_method="env://", rank=0, world_size=1)
listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
print(*sorted({place.ip for place in listening if place.port == int(sys.argv[2])}))
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "address"), [("narrow", "127.0.0.2"), ("as torch does", "::")])
def test_the_store_listens_where_workers_are_told(how, address):
    """The second row is torch's own way: where it changes, narrowing may have become needless, or have broken."""
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = str(taken.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": port, "PATH": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", LISTENS, how, port]
    done = subprocess.run(command, cwd=ROOT, env=place, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, address), done.stderr


@pytest.mark.parametrize("address", ["192.0.2.1", "node-3"])  # RFC 5737: nobody's; and no address at all
def test_an_address_that_is_not_this_machines_is_left_to_torch(address):
    assert _listener(address, 0) is None


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        _listener("127.0.0.1", taken.getsockname()[1])
