"""An HTTP server and an S3 server (moto) for tests of streaming: they misbehave by rule, and log what they send.

    with FileServer(folder) as server:  # or S3Server(folder)
        server.fault = first(1, Cut(1000), "train-000000.tar")
        Store(server.url, server.endpoint).read("train-000000.tar")  # raises
        assert server.log == [Request("GET", "train-000000.tar", sent=1000)]

What can go wrong stands in `faults.py`.
"""

import http.client
import logging
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote

import pytest

from tests.faults import ACCESS_DENIED as ACCESS_DENIED
from tests.faults import PAGE, Cut, Fault, Flip, Html, NoRanges, Request, Rule, Slow, Stall, Status
from tests.faults import always as always
from tests.faults import each as each
from tests.faults import first as first

PIECE = 1 << 16  # bytes that are sent, and counted, at once
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
OF_THE_CONNECTION = ("connection", "transfer-encoding", "date", "server")  # headers that the next hop has its own of


@dataclass(frozen=True)
class Answer:
    """Of HTTP; names of headers in small letters. The body of a HEAD is not sent."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Server:
    """On a free port of this host, while the context lasts. fault: (request, how often that was asked before) -> Fault.

    Subclasses answer; this one misbehaves. No thread and no socket is left at the end.
    """

    endpoint: str  # http://host:port
    prefix = ""  # of every path
    fault: Rule

    def __enter__(self):
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.behave()
        self._http = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.hang_up()
        self.closing.set()  # after that: who stalled finds nobody to send to
        self._http.server_close()  # waits for the threads of all connections
        self._thread.join()

    def behave(self) -> None:
        """Forgets faults and log: for servers that several tests share, one after the other."""
        self.fault = lambda _request, _nth: None
        self._log: list[list[Request]] = []  # cells: a request that outlives a test counts in its own
        self._counts: Counter[tuple[str, str]] = Counter()

    @property
    def log(self) -> list[Request]:
        """All requests so far, in the order of their arrival."""
        with self._lock:
            return [request for (request,) in self._log]

    def sent(self, path: str) -> int:
        """Bytes of the bodies of all GETs of a path."""
        return sum(r.sent for r in self.log if (r.method, r.path) == ("GET", path))

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Of a server that behaves. target: path and query as they came."""
        raise NotImplementedError

    def arrived(self, method: str, target: str, span: str) -> tuple[list[Request], Fault | None]:
        """Logs a request; returns its place in the log and what is to go wrong with it."""
        path = unquote(target.partition("?")[0]).lstrip("/").removeprefix(self.prefix).lstrip("/")
        ends = re.fullmatch(r"bytes=(\d+)-(\d*)", span)
        begin, end = (int(ends[1]), int(ends[2]) + 1 if ends[2] else None) if ends else (None, None)
        logged = [Request(method, path, begin, end)]
        with self._lock:
            self._log.append(logged)
            nth = self._counts[method, path]
            self._counts[method, path] += 1
        return logged, self.fault(logged[0], nth)

    def count(self, logged: list[Request], sent: int) -> None:
        """Adds to what was sent for a request."""
        with self._lock:
            logged[0] = replace(logged[0], sent=logged[0].sent + sent)


class FileServer(Server):
    """Serves a folder over HTTP/1.1, ranges too, to read only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def url(self) -> str:
        """Of the folder."""
        return self.endpoint

    def answer(self, method, target, headers, body):
        path = self.folder / unquote(target.partition("?")[0]).lstrip("/")
        if method not in ("GET", "HEAD"):
            return Answer(405, b"read only")
        if not path.is_file():
            return Answer(404, PAGE)
        data = path.read_bytes()
        ends = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if not ends:
            return Answer(200, data, {"accept-ranges": "bytes"})
        begin, end = int(ends[1]), min(int(ends[2] or len(data)) + 1, len(data))
        if begin >= end:
            return Answer(416, b"", {"content-range": f"bytes */{len(data)}"})
        return Answer(206, data[begin:end], {"content-range": f"bytes {begin}-{end - 1}/{len(data)}"})


class S3Server(Server):
    """moto's S3 with the files of a folder in a bucket of its own, behind the server that misbehaves.

    Sets fake credentials in the environment, which child processes inherit, while it lives.
    """

    _living: ClassVar[list["S3Server"]] = []
    _born = 0

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @property
    def url(self) -> str:
        """Of what was the folder."""
        return f"s3://{self.prefix}"

    def __enter__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        S3Server._born += 1
        S3Server._living.append(self)
        bucket = f"bucket-{S3Server._born}"  # all that live in one process share their buckets
        self.prefix = f"{bucket}/some/prefix"
        self._put(bucket)
        for path in sorted(self.folder.rglob("*")) if self.folder else ():
            if path.is_file():
                self._put(f"{self.prefix}/{path.relative_to(self.folder).as_posix()}", path.read_bytes())
        self._environment = pytest.MonkeyPatch()
        for name, value in CREDENTIALS.items():
            self._environment.setenv(name, value)
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        self._environment.undo()
        S3Server._living.remove(self)
        if not S3Server._living:
            self.answer("POST", "/moto-api/reset", {}, b"")  # closes its files
        self._moto.stop()

    def answer(self, method, target, headers, body):
        line = http.client.HTTPConnection(*self._moto.get_host_and_port())
        try:
            line.request(method, target, body or None, dict(headers))
            answer = line.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            kept = {name: value for name, value in told.items() if name not in OF_THE_CONNECTION}
            return Answer(answer.status, answer.read(), kept)
        finally:
            line.close()

    def _put(self, path: str, data: bytes = b"") -> None:
        answer = self.answer("PUT", f"/{quote(path)}", {}, data)
        assert answer.status == 200, answer


class _Listener(ThreadingHTTPServer):
    """Knows its connections, so that none outlives it."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def process_request(self, request, client_address):
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that went away is none
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    owner: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_): ...

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._logged, fault = self.owner.arrived(self.command, self.path, self.headers.get("range", ""))
        headers = {k.lower(): v for k, v in self.headers.items()}
        if isinstance(fault, NoRanges):
            headers.pop("range", None)
        match fault:
            case Status(code, page):
                answer = Answer(code, page)
            case Html():
                answer = Answer(200, PAGE, {"content-type": "text/html"})
            case _:
                answer = self.owner.answer(self.command, self.path, headers, body)
        self._send(_flipped(answer, fault.offset) if isinstance(fault, Flip) else answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = do_MKCOL = serve

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        body = b"" if self.command == "HEAD" else answer.body
        if fault == Cut(0):
            self.close_connection = True
            return
        if isinstance(fault, Stall) and not fault.after_bytes:
            self.owner.closing.wait(fault.seconds)
        self._head(answer)
        match fault:
            case Cut(after) if after < len(body):
                self._write(body[:after])
                self.close_connection = True
            case Stall(seconds, after) if 0 < after < len(body):
                self._write(body[:after])
                self.owner.closing.wait(seconds)
                self._write(body[after:])
            case Slow(rate):
                for begin in range(0, len(body), max(1, rate // 20)):
                    self._write(body[begin : begin + max(1, rate // 20)])
                    self.owner.closing.wait(1 / 20)
            case _:
                self._write(body)

    def _head(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in ({"content-length": str(len(answer.body))} | dict(answer.headers)).items():
            self.send_header(name, value)
        self.end_headers()

    def _write(self, data: bytes) -> None:
        for begin in range(0, len(data), PIECE):
            piece = data[begin : begin + PIECE]
            self.owner.count(self._logged, len(piece))
            self.wfile.write(piece)


def _flipped(answer: Answer, offset: int) -> Answer:
    """With one bit of the object changed, where the answer holds it."""
    begin = re.match(r"bytes (\d+)-", answer.headers.get("content-range", ""))
    at = offset - (int(begin[1]) if begin else 0)
    if not 0 <= at < len(answer.body):
        return answer
    return replace(answer, body=answer.body[:at] + bytes([answer.body[at] ^ 1]) + answer.body[at + 1 :])
