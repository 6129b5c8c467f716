"""The jobs of a cluster, through its dashboard: submitted, looked at, their logs read."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.runtime_env import RuntimeEnv
from ray.runtime_env.runtime_env import _validate_no_local_paths

from orchestrator.cluster.gate import ANSWER_S, Token, manner, proxy, why
from orchestrator.submission import check_open
from pipelines.errors import ClusterError, ConfigError

ADDRESS = "RAY_API_SERVER_ADDRESS"
SLOWEST = 2**17  # bytes a second that an upload may need: 1 Mbit/s, 14 minutes for the largest package
SILENT_S = 60.0  # after so long without a word the log is opened anew: a connection may be cut off and not know it
TAKEN = "already exists"  # Ray's words for an id that was used before


class Away(ClusterError):
    """The server does not answer, or not yet; it may come back."""


class NoTail(ClusterError):
    """A log cannot be read as it comes: the server is away, or something on the way has no websockets."""


@dataclass(frozen=True)
class Job:
    """A submitted job as the server has it. `status`: PENDING, RUNNING, or an end: SUCCEEDED, FAILED, STOPPED.

    exit_code: of its driver, None where it has none (yet, or because it was lost). error: Ray's name for how it failed.
    """

    id: str
    status: str
    entrypoint: str = ""
    exit_code: int | None = None
    error: str = ""
    message: str = ""
    env_vars: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """A cluster's jobs. Every call but `tail` raises Away where the server does not answer as it should, ClusterError
    where it does not let this token in."""

    def __init__(self, address: str, token: Token) -> None:
        self.address, self._token = address, token
        os.environ[ADDRESS] = address  # Ray prefers it to what it is told
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # else ten lines for each upload
        with self._answering():
            self._client = _Client(address, token)

    def all(self) -> list[Job]:
        """Those that were submitted, whether they still run or not."""
        with self._answering():
            return [_job(details) for details in self._client.list_jobs() if details.submission_id]

    def find(self, id: str) -> Job | None:
        """The job; None where the server knows none of that id."""
        with self._answering():
            try:
                return _job(self._client.get_job_info(id))
            except _Refused as error:
                if error.status == 404 and "does not exist" in error.text:  # a proxy without a server has no such words
                    return None
                raise

    def submit(self, id: str, entrypoint: str, package: Path, env_vars: Mapping[str, str], rest: Mapping[str, Any],
               metadata: Mapping[str, str], resources: Mapping[str, float]) -> None:  # fmt: skip
        """Uploads the package where the server lacks it, and starts the job.

        package: what `pack` made. rest: of the runtime environment. resources: that the driver asks for. Raises
        ClusterError where the server does not take it.
        """
        environment = {**rest, "env_vars": dict(env_vars), "working_dir": str(package)}
        with self._answering():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=id,
                    runtime_env=environment,
                    metadata=dict(metadata),
                    entrypoint_resources=dict(resources) or None,
                )
            except _Refused as error:
                if error.status >= 500 and TAKEN not in error.text:
                    raise  # a head that has just started, or is about to end
                raise ClusterError(f"the cluster at {self.address} does not take job {id}: {error.last}") from error

    def tail(self, id: str) -> Iterator[str]:
        """The job's log from its beginning, as it comes; ends with the job, whenever the connection does, and after
        SILENT_S without a word. Raises NoTail where there never was a connection."""
        with asyncio.Runner() as runner, suppress(aiohttp.ClientError, OSError):
            words = self._words(f"{self.address}/api/jobs/{id}/logs/tail")
            while (text := runner.run(_next(words))) is not None:
                yield text

    def log(self, id: str) -> str:
        """The job's log, as far as it is written."""
        with self._answering():
            return self._client.get_job_logs(id)

    async def _words(self, url: str) -> AsyncIterator[str]:
        """Ray's own reader waits for ever for a server that was cut off, and leaves its connection open."""
        patience = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_S, sock_read=SILENT_S)
        silence = aiohttp.ClientWSTimeout(ws_receive=SILENT_S, ws_close=1.0)
        async with aiohttp.ClientSession(headers=self._token.headers, timeout=patience) as session:
            try:
                socket = await session.ws_connect(url, timeout=silence, proxy=proxy(url) or None)
            except (aiohttp.ClientError, OSError, ValueError) as error:  # a ValueError of a proxy that is none for it
                status = f"HTTP {error.status}" if isinstance(error, aiohttp.WSServerHandshakeError) else why(error)
                raise NoTail(f"no websocket to {self.address} ({status})") from error
            async with socket:
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        yield message.data

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """What goes wrong inside, as ours."""
        try:
            yield
        except AuthenticationError as error:
            shown = f"the token in {self._token.file}" if self._token.secret else "a request without a token"
            raise ClusterError(f"the cluster at {self.address} refuses {shown}; take the one that its `ray start` was "
                               f"given (RAY_AUTH_TOKEN_PATH there)") from error  # fmt: skip
        except _Refused as error:
            raise Away(f"{self.address} has no answer now ({error.last})") from error
        except (OSError, RuntimeError) as error:  # what requests raises is an OSError, Ray's own a RuntimeError
            raise Away(f"{self.address} does not answer ({why(error)})") from error


def parsed(rest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a runtime-env file says to Ray alone, with the files that it names read: they may be gone when the job is
    submitted again. Raises ConfigError where Ray does not take it, and where such a file shows a secret."""
    try:
        found = RuntimeEnv(**rest)
        _validate_no_local_paths(found)
    except (ValueError, TypeError, OSError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"--runtime-env {path}: Ray does not take it: {what}") from error
    return check_open(f"--runtime-env {path}:", found.to_dict())


def pack(folder: Path, excludes: Sequence[str], file: Path) -> None:
    """A folder as the zip that a job runs in, as Ray makes it: without what .gitignore and .rayignore name.

    Made once, so that a job that is submitted again hours later runs the same code, whatever became of the folder.
    """
    left_out = [*get_runtime_env_default_excludes(), *excludes]
    create_package(str(folder), file, include_gitignore=True, excludes=left_out)


async def _next(words: AsyncIterator[str]) -> str | None:
    return await anext(words, None)


class _Refused(RuntimeError):
    """The server answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text

    @property
    def last(self) -> str:
        """The last line: what it says may be a traceback."""
        lines = self.text.strip().splitlines()
        return f"HTTP {self.status}: {lines[-1].strip() if lines else 'no words'}"


class _Client(JobSubmissionClient):
    """Ray's, with an end to its patience, and an error that knows its status."""

    def __init__(self, address: str, token: Token) -> None:
        self._manner = manner(address, token)
        super().__init__(address, headers=token.headers)

    def _do_request(self, method: str, endpoint: str, data: bytes = b"", **rest: Any) -> Any:
        seconds = ANSWER_S + len(data) / SLOWEST  # one limit for sending all of it, and one for the answer
        return super()._do_request(method, endpoint, data=data or None, timeout=seconds, **self._manner, **rest)

    def _raise_error(self, answer: Any) -> NoReturn:
        raise _Refused(answer.status_code, answer.text)


def _job(details: Any) -> Job:
    return Job(
        details.submission_id,
        details.status.value,
        details.entrypoint,
        details.driver_exit_code,
        details.error_type or "",
        details.message or "",
        (details.runtime_env or {}).get("env_vars") or {},
    )
