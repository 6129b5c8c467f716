"""What answers on a machine and how, seen as an attacker sees it; run there, or on a machine beside it.

    python -m tests.ports scan ADDRESS           every TCP port that takes a connection, as JSON
    python -m tests.ports ask TOKEN_FILE JSON    what listens here, and what it answers to the questions (`answers`)
    python -m tests.ports listen                 a port that everybody reaches; says which, until it is killed

A question is `GET /path` (answer: HTTP's status), `Service/Method` of Ray or of gRPC's health (answer: gRPC's code), or
`TCPStore` of torch (answer: OK). Who does not speak that language answers `nothing`.
"""

import errno
import http.client
import json
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

HOST = "127.0.0.1"
ALL = range(1, 65536)
AT_ONCE = 512
AT_ONCE_ASKED = 16
WAIT_S = 3.0
VALIDATE, MAGIC, COUNT_KEYS = 0, 0x3C85F7CE, 7  # what torch's clients say (TCPStoreBackend.hpp)
TOKENS = ("none", "wrong", "right")


def scan(host: str, ports: range = ALL) -> list[int]:
    """The ports of a host that take a connection within WAIT_S."""
    chunks = [ports[i : i + AT_ONCE] for i in range(0, len(ports), AT_ONCE)]
    return [port for chunk in chunks for port in sorted(_taken(host, chunk))]


def _taken(host: str, ports: range) -> set[int]:
    found, waiting, poll = set(), {}, select.poll()
    for port in ports:
        probe = socket.socket()
        probe.setblocking(False)
        if (code := probe.connect_ex((host, port))) == errno.EINPROGRESS:
            waiting[probe.fileno()] = (probe, port)
            poll.register(probe, select.POLLOUT)
            continue
        if code == 0 and _other(probe):
            found.add(port)
        probe.close()
    limit = time.monotonic() + WAIT_S
    while waiting and (left := limit - time.monotonic()) > 0:
        for number, _ in poll.poll(left * 1000):
            probe, port = waiting.pop(number)
            poll.unregister(number)
            if not probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) and _other(probe):
                found.add(port)
            probe.close()
    for probe, _ in waiting.values():
        probe.close()
    return found


def _other(probe: socket.socket) -> bool:
    """Whether somebody else is there: a socket that was given the port it asks for connects to itself."""
    with suppress(OSError):
        return probe.getsockname() != probe.getpeername()
    return False


@dataclass(frozen=True)
class Listener:
    """A port that a process of this machine listens on, TCP or UDP."""

    port: int
    command: str
    addresses: tuple[str, ...]

    @property
    def kinds(self) -> set[str]:
        """Of loopback, node (an address of its own network) and all (every interface)."""
        return {"all" if one in ("::", "0.0.0.0") else "loopback" if one.startswith("127.") else "node"
                for one in self.addresses}  # fmt: skip

    @property
    def host(self) -> str:
        """An address where this machine reaches it."""
        return self.addresses[0] if self.kinds == {"node"} else HOST


def listening() -> list[Listener]:
    """What listens here."""
    found: dict[tuple[int, str], set[str]] = {}
    for place in psutil.net_connections("inet"):
        if place.status == psutil.CONN_LISTEN or (place.type == socket.SOCK_DGRAM and not place.raddr):
            command = " ".join(psutil.Process(place.pid).cmdline()) if place.pid else ""
            found.setdefault((place.laddr.port, command), set()).add(place.laddr.ip.removeprefix("::ffff:"))
    return [Listener(*key, tuple(sorted(addresses))) for key, addresses in sorted(found.items())]


def ask(host: str, port: int, question: str, token: str | None) -> str:
    """The answer of a port, without a token where it is None."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    if question == "TCPStore":
        return _store(host, port)
    if question.startswith("GET "):
        return _page(host, port, question.removeprefix("GET "), headers)
    return _call(f"{host}:{port}", question, headers)


def _page(host: str, port: int, path: str, headers: Mapping[str, str]) -> str:
    connection = http.client.HTTPConnection(host, port, timeout=WAIT_S)
    try:
        connection.request("GET", path, headers=dict(headers))
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        return "nothing"
    finally:
        connection.close()


def _call(place: str, question: str, headers: Mapping[str, str]) -> str:
    """With an empty message, which all of the page's methods take."""
    import grpc

    package = "grpc.health.v1" if question.startswith("Health/") else "ray.rpc"
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(f"/{package}.{question}")(b"", timeout=WAIT_S, metadata=tuple(headers.items()))
        except grpc.RpcError as error:
            code = str(error.code().name)
            return "nothing" if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED") else code
    return "OK"


def _store(host: str, port: int) -> str:
    """Asks for the number of its keys. By hand, because torch's client waits for ever where something else listens."""
    with suppress(OSError), socket.create_connection((host, port), timeout=WAIT_S) as peer:
        peer.sendall(struct.pack("<BIB", VALIDATE, MAGIC, COUNT_KEYS))
        answer = peer.recv(8, socket.MSG_WAITALL)
        return "OK" if len(answer) == 8 and 0 < struct.unpack("<q", answer)[0] < 10**6 else "nothing"
    return "nothing"


def answers(questions: Mapping[str, Sequence[str]], token: str) -> list[dict[str, Any]]:
    """What listens here and how it answers. questions: {part of a command line: what such a process is asked}."""
    found = listening()
    with ThreadPoolExecutor(AT_ONCE_ASKED) as pool:
        told = pool.map(lambda one: _told(one, questions, token), found)
        return [{**asdict(one), "kinds": sorted(one.kinds), "answers": of_it}
                for one, of_it in zip(found, told, strict=True)]  # fmt: skip


def _told(one: Listener, questions: Mapping[str, Sequence[str]], token: str) -> dict[str, dict[str, str]]:
    tokens = dict(zip(TOKENS, (None, "0" * len(token), token), strict=True))
    asked = sorted({question for part, own in questions.items() if part in one.command for question in own})
    return {q: {name: ask(one.host, one.port, q, value) for name, value in tokens.items()} for q in asked}


def main(what: str, where: str = "", questions: str = "") -> None:
    """One of the three commands."""
    if what == "scan":
        print(json.dumps(scan(where)))
    elif what == "ask":
        with open(where) as file:
            token = file.read().strip()
        seen, open_here = answers(json.loads(questions), token), scan(HOST)
        print(json.dumps({"seen": seen, "scan": open_here, "after": [one.port for one in listening()]}))
    else:
        with socket.create_server(("", 0)) as server:
            print(server.getsockname()[1], flush=True)
            signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
