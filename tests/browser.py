"""A headless Chromium, for tests that look at pages: speaks its DevTools protocol over aiohttp, which Ray brings."""

import asyncio
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def until(url: str, script: str, good: Any, seconds: int = 60) -> Any:
    """Opens `url` and runs `script` once a second, until `good(value)` holds or time is up; returns the last value."""
    with _chromium() as host:
        return asyncio.run(_until(host, url, script, good, seconds))


async def _until(host: str, url: str, script: str, good: Any, seconds: int) -> Any:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{host}/json") as answer:
            page = next(tab for tab in await answer.json() if tab["type"] == "page")
        async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            await _call(socket, "Page.navigate", url=url)
            value = None
            for _ in range(seconds):
                await asyncio.sleep(1)
                answer = await _call(socket, "Runtime.evaluate", expression=f"JSON.stringify({script})")
                value = json.loads(answer["result"].get("value", "null"))
                if good(value):
                    break
            return value


async def _call(socket: aiohttp.ClientWebSocketResponse, method: str, **params: Any) -> Any:
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
