"""An HTTP server and an S3 server (moto) on this host, each in a process of its own, that count what they send.

    with Server("http", folder) as server:  # or "s3"
        open_dataset(server.url, server.endpoint)
        server.sent  # bytes of all bodies so far

The process ends when its standard input does, so that none outlives whoever started it.
"""

import http.client
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self
from urllib.parse import unquote, urlsplit

from pipelines.errors import ClusterError

Kind = Literal["http", "s3"]
ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
BUCKET = "benchmark"
PIECE = 1 << 16  # bytes that a link sends at once
SENT = "/-/sent"  # what is asked for how much was sent
PUBLIC = {"x-amz-acl": "public-read"}  # for clients that cannot sign
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}


class Server:
    """Serves a folder while the context lasts. S3's bucket holds what is in the folder when it starts.

    link: MB/s that all connections to the HTTP server share; 0: as fast as it can.
    """

    def __init__(self, kind: Kind, folder: Path, link: int = 0) -> None:
        self.kind, self._folder, self._link = kind, folder, link

    @property
    def url(self) -> str:
        """Of the folder."""
        return self.address if self.kind == "http" else f"s3://{BUCKET}"

    @property
    def endpoint(self) -> str:
        """Of the S3 server; '' for the other one."""
        return self.address if self.kind == "s3" else ""

    @property
    def objects(self) -> str:
        """The folder's URL for clients that speak HTTP only: they may be read without a signature."""
        return self.address if self.kind == "http" else f"{self.address}/{BUCKET}"

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    @property
    def sent(self) -> int:
        """Bytes."""
        return int(self._ask("GET", SENT))

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "benchmarks.servers", self.kind, str(self._folder.absolute()), str(self._link)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        port = self._process.stdout.readline().strip()
        if not port:
            self.__exit__()
            raise ClusterError(f"the {self.kind} server did not start; what it said is above")
        self.address = f"http://{HOST}:{port}"
        if self.kind == "s3":
            self._upload()
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()
        self._process.wait()

    def _upload(self) -> None:
        self._ask("PUT", f"/{BUCKET}")
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                self._ask("PUT", f"/{BUCKET}/{path.relative_to(self._folder).as_posix()}", path)

    def _ask(self, method: str, target: str, body: Path | None = None) -> bytes:
        line = http.client.HTTPConnection(urlsplit(self.address).netloc)
        try:
            line.request(method, target, body.read_bytes() if body else None, PUBLIC)
            answer = line.getresponse()
            said = answer.read()
        finally:
            line.close()
        if answer.status != 200:
            raise ClusterError(f"{method} {target} of the {self.kind} server: {answer.status} {answer.reason}")
        return said


# -- in the server's process -------------------------------------------------------------------------------------------


class _Count:
    """Bytes that several threads send."""

    def __init__(self) -> None:
        self._lock, self.total = threading.Lock(), 0

    def add(self, sent: int) -> None:
        with self._lock:
            self.total += sent


class Link:
    """A wire that sends so many bytes a second, one piece after the other, whoever's they are."""

    def __init__(self, rate: float) -> None:
        self._lock, self._rate, self._free = threading.Lock(), rate, 0.0

    def due(self, size: int, now: float) -> float:
        """When a piece that is given to it now is through; seconds of the same clock."""
        with self._lock:
            self._free = max(self._free, now) + size / self._rate
            return self._free


class _Files(BaseHTTPRequestHandler):
    """One connection; the kernel copies from file to socket."""

    folder: Path
    count: _Count
    link: Link | None
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        if self.path == SENT:
            told = str(self.count.total).encode()
            self._head(200, len(told))
            self.wfile.write(told)
        else:
            self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        path = self.folder / unquote(self.path.partition("?")[0]).lstrip("/")
        if not path.resolve().is_relative_to(self.folder) or not path.is_file():
            self._head(404, 0)
            return
        with path.open("rb") as file:
            size = path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            begin, end = (int(asked[1]), min(int(asked[2] or size) + 1, size)) if asked else (0, size)
            if asked and begin < end:
                self._head(206, end - begin, {"Content-Range": f"bytes {begin}-{end - 1}/{size}"})
            else:
                self._head(416 if asked else 200, end - begin if begin < end else 0)
            if body and begin < end:
                self._send(file, begin, end)

    def _send(self, file: BinaryIO, begin: int, end: int) -> None:
        piece = PIECE if self.link else end - begin
        for at in range(begin, end, piece):
            size = min(piece, end - at)
            if self.link:
                now = time.monotonic()
                time.sleep(self.link.due(size, now) - now)
            self.count.add(self.connection.sendfile(file, at, size))

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(length), "Accept-Ranges": "bytes"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is none
            super().handle_error(request, client_address)


def _files(folder: Path, link: int) -> ThreadingHTTPServer:
    kept = {"folder": folder.resolve(), "count": _Count(), "link": Link(link * 1e6) if link else None}
    return _Listener((HOST, 0), type("Files", (_Files,), kept))


def _moto() -> Any:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
    app = _counted(DomainDispatcherApplication(create_backend_app), _Count())
    return make_server(HOST, 0, app, threaded=True, request_handler=MotoRequestHandler)


def _counted(app: Callable[..., Iterable[bytes]], count: _Count) -> Callable[..., Iterator[bytes]]:
    """A WSGI application that says how much another one sent."""

    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterator[bytes]:
        if environ["PATH_INFO"] == SENT:
            told = str(count.total).encode()
            start("200 OK", [("Content-Length", str(len(told)))])
            yield told
            return
        for part in app(environ, start):
            count.add(len(part) if environ["REQUEST_METHOD"] == "GET" else 0)
            yield part

    return serve


def _main(kind: str, folder: str, link: str) -> None:
    server = _files(Path(folder), int(link)) if kind == "http" else _moto()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()  # until whoever started this lets go


if __name__ == "__main__":
    _main(*sys.argv[1:])
