"""A headless Chromium, for tests that look at pages: speaks its DevTools protocol over aiohttp, which Ray brings.

A test that fails while a page is open keeps what the page showed: a picture and its text.
"""

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = "SKIPLANE_TEST_SHOTS"  # environment variable: the folder for pictures; else a new temporary one, which stays
ANSWER_S = 30.0  # that the browser may take for one


class Page:
    """An open page. Scripts are expressions of JavaScript; values come back as JSON's."""

    def __init__(self, runner: asyncio.Runner, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._runner, self._socket = runner, socket

    def ask(self, script: str) -> Any:
        """What the script comes to now; None where it raises."""
        answer = self._call("Runtime.evaluate", expression=f"JSON.stringify({script})")
        return json.loads(answer["result"].get("value", "null"))

    def until(self, script: str, good: Callable[[Any], Any], seconds: float = 60.0) -> Any:
        """Asks twice a second until `good(value)` holds. Raises AssertionError where time is up."""
        limit = time.monotonic() + seconds
        while not good(value := self.ask(script)):
            assert time.monotonic() < limit, f"after {seconds:g} s the page still has {value!r}"
            time.sleep(0.5)
        return value

    def keep(self) -> Path:
        """The folder in which page.png and page.txt of this page are now; each page gets a new one."""
        place = os.environ.get(SHOTS)
        if place:
            Path(place).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="skiplane-page-", dir=place))
        (folder / "page.txt").write_text(str(self.ask("location.href + '\\n\\n' + document.body.innerText")))
        (folder / "page.png").write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))
        return folder

    def _call(self, method: str, **params: Any) -> Any:
        return self._runner.run(asyncio.wait_for(_call(self._socket, method, params), ANSWER_S))


@contextmanager
def opened(url: str, user: str = "", password: str = "") -> Iterator[Page]:
    """Opens a page, as somebody who has given user and password where there is a user. An error meanwhile gets a note
    that names the folder with what the page showed."""
    with _chromium() as host, asyncio.Runner() as runner:
        session, socket = runner.run(_connect(host))
        page = Page(runner, socket)
        try:
            if user:  # a page whose address has them may not fetch anything
                pair = base64.b64encode(f"{user}:{password}".encode()).decode()
                page._call("Network.enable")
                page._call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {pair}"})
            page._call("Page.navigate", url=url)
            yield page
        except Exception as error:
            error.add_note(_kept(page))
            raise
        finally:
            runner.run(_close(session, socket))


def _kept(page: Page) -> str:
    try:
        return f"what the page showed is in {page.keep()}"
    except Exception as error:  # the browser is gone, say: no reason to hide the first error
        return f"what the page showed could not be kept: {error!r}"


async def _connect(host: str) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    async with session.get(f"http://{host}/json") as answer:
        tab = next(tab for tab in await answer.json() if tab["type"] == "page")
    return session, await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)


async def _close(session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
    await socket.close()
    await session.close()


async def _call(socket: aiohttp.ClientWebSocketResponse, method: str, params: dict[str, Any]) -> Any:
    await socket.send_json({"id": 1, "method": method, "params": params})
    while "id" not in (message := json.loads((await socket.receive()).data)):
        pass
    return message["result"]


@contextmanager
def _chromium() -> Iterator[str]:
    """Yields host:port of its DevTools."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                   "--window-size=1600,1000", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                found = next(m for line in process.stderr if (m := re.search(r"ws://([^/]+)/", line)))
                yield found[1]
            finally:
                process.terminate()
                process.stderr.read()  # until it has really ended: it logs while it goes
