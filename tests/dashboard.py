"""A server in the place of a cluster's dashboard, and stand-ins for what `jobs.submit` meets behind it.

with Server() as server:
    server.answers["/api/jobs/a"] = (404, "Job a does not exist")
    assert Jobs(server.url, TOKEN).find("a") is None
    assert server.asked[-1] == ("GET", "/api/jobs/a", f"Bearer {SECRET}")
"""

import asyncio
import threading

import aiohttp.web

from orchestrator.cluster.gate import Token
from orchestrator.cluster.jobs import Job

SECRET = "0123456789abcdef0123456789abcdef"
TOKEN, NONE = Token(SECRET, "/t"), Token()


class Server:
    """Answers as it is told to, in a thread. answers: path -> (status, text), or what serves a request."""

    def __init__(self) -> None:
        self.answers: dict = {"/api/version": (200, '{"ray_version": "2.60.0"}')}
        self.asked: list[tuple[str, str, str]] = []  # method, path, token
        self._loop, self._up = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(30)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody listens any more."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        app = aiohttp.web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = aiohttp.web.AppRunner(app, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._up.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):  # answers that never came
            task.cancel()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request):
        self.asked.append((request.method, request.path, request.headers.get("Authorization", "")))
        found = self.answers.get(request.path, (404, "404: Not Found"))
        if callable(found):
            return await found(request)
        return aiohttp.web.Response(status=found[0], text=found[1], content_type="application/json")


class Cluster:
    """A stand-in for the door. tails: of each reading of a log, in turn. ends: what `find` says, in turn. whole: what
    there is of the log after an end, or an error."""

    address = "http://c"

    def __init__(self, tails=(), ends=(), known=()) -> None:
        self.tails, self.ends, self.known = iter(tails), iter(ends), list(known)
        self.submitted: list[tuple] = []
        self.whole: str | BaseException = ""

    def all(self) -> list[Job]:
        return self.known

    def find(self, id):
        found = next(self.ends)
        if isinstance(found, BaseException):
            raise found
        return found

    def submit(self, id, *rest) -> None:
        self.submitted.append((id, *rest))

    def log(self, id) -> str:
        if isinstance(self.whole, BaseException):
            raise self.whole
        return self.whole

    def tail(self, id):
        for chunk in next(self.tails, ()):
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


class Recorder:
    def __init__(self) -> None:
        self.lines, self.text = [], ""

    def say(self, line) -> None:
        self.lines.append(line)

    def write(self, text) -> None:
        self.text += text


class Clock:
    """Time that passes by pauses alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds) -> None:
        self.now += seconds
