"""The door to a cluster's jobs: what a server's answers mean, and logs that break off."""

import asyncio
import json
import os
from pathlib import Path

import aiohttp.web
import pytest
from ray._private.runtime_env.packaging import get_uri_for_package

from orchestrator.cluster import jobs as door
from orchestrator.cluster import services
from orchestrator.cluster.jobs import Away, Job
from pipelines.errors import ClusterError, ConfigError
from tests.dashboard import NONE, SECRET, TOKEN, Server

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(monkeypatch):
    """Of which the shell says nothing."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # the door changes it
    with Server() as made:
        yield made


DETAILS = {"type": "SUBMISSION", "submission_id": "a", "status": "FAILED", "entrypoint": "x", "driver_exit_code": 3,
           "runtime_env": {"env_vars": {"A": "1"}}}  # fmt: skip


@pytest.fixture
def jobs(server) -> door.Jobs:
    return door.Jobs(server.url, TOKEN)


def test_jobs_as_the_server_has_them(server, jobs):
    by_hand = {"type": "DRIVER", "submission_id": None, "status": "RUNNING", "entrypoint": "y"}
    server.answers |= {"/api/jobs/": (200, json.dumps([DETAILS, by_hand])), "/api/jobs/a": (200, json.dumps(DETAILS))}
    expected = Job("a", "FAILED", "x", exit_code=3, env_vars={"A": "1"})
    assert (jobs.all(), jobs.find("a")) == ([expected], expected)
    assert {token for _, _, token in server.asked} == {f"Bearer {SECRET}"}


def test_an_address_that_the_shell_says_otherwise_does_not_win(server, jobs):
    assert os.environ["RAY_API_SERVER_ADDRESS"] == server.url


@pytest.mark.parametrize(("status", "known"), [(401, "Missing"), (403, "Invalid")])
def test_a_wrong_token(server, status, known):
    server.answers["/api/version"] = (status, known)
    with pytest.raises(
        ClusterError, match=r"refuses the token in /t; take the one that its `ray start` was given"
    ) as e:
        door.Jobs(server.url, TOKEN)
    assert not isinstance(e.value, Away)  # another one is needed: waiting does not help
    with pytest.raises(ClusterError, match="refuses a request without a token"):
        door.Jobs(server.url, NONE)


def test_the_server_does_not_know_the_job(server, jobs):
    server.answers["/api/jobs/a"] = (404, "Job a does not exist")
    assert jobs.find("a") is None


@pytest.mark.parametrize(
    "answer", [(404, "default backend - 404"), (502, "Bad Gateway"), (500, "Traceback\nGCS is gone")]
)
def test_a_proxy_without_its_server_and_a_head_that_ends_are_no_answers(server, jobs, answer):
    server.answers["/api/jobs/a"] = answer
    with pytest.raises(Away, match=f"has no answer now .HTTP {answer[0]}: {answer[1].splitlines()[-1]}"):
        jobs.find("a")


def test_a_server_that_is_gone(server, jobs):
    server.close()
    with pytest.raises(Away, match=r"does not answer \(Connection refused\)"):
        jobs.all()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (
            (500, "Traceback\nValueError: Job with submission_id a already exists."),
            ClusterError,
            "does not take job a: .*",
        ),
        ((400, "no such field"), ClusterError, "does not take job a: HTTP 400: no such field"),
        ((500, "No available agent to submit job, please try again later."), Away, "has no answer now"),
    ],
)
def test_a_job_that_is_not_taken(server, jobs, tmp_path, answer, kind, words):
    package = tmp_path / "a.zip"
    door.pack(ROOT / "infra", [], package)

    async def take(request):
        return aiohttp.web.Response(status=200 if request.method == "PUT" else 404)

    name = get_uri_for_package(package).removeprefix("gcs://")
    server.answers |= {f"/api/packages/gcs/{name}": take, "/api/jobs/": answer}
    with pytest.raises(ClusterError, match=words) as caught:
        jobs.submit("a", "x", package, {}, {}, {}, {})
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({"pip": ["a"], "conda": {}}, "cannot be specified at the same time"),
        ({"pip": "/none.txt"}, "/none.txt is not a valid file"),
        ({"py_modules": [str(ROOT / "jobs")]}, "is not a valid URI"),  # nobody would pack it again for a lost head
        ({"py_modules": "x"}, "must be a list"),
        ({1: 2}, "keywords must be strings"),
    ],
)
def test_a_runtime_env_that_ray_does_not_take(rest, words):
    with pytest.raises(ConfigError, match=f"^--runtime-env env.yaml: Ray does not take it: .*{words}"):
        door.parsed(rest, Path("env.yaml"))


def test_a_runtime_env_s_files_are_read_at_once_and_their_secrets_refused(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("numpy\n")
    found = door.parsed({"pip": str(file)}, Path("env.yaml"))
    assert found["pip"]["packages"] == ["numpy"]
    assert door.parsed(found, Path("env.yaml")) == found
    file.write_text("--index-url https://me:pw@h/simple\nnumpy\n")
    with pytest.raises(ConfigError, match=r"^--runtime-env env.yaml: packages looks like a secret"):
        door.parsed({"pip": str(file)}, Path("env.yaml"))


def test_a_large_package_has_longer_for_its_way(server, jobs, tmp_path, monkeypatch):
    package, naps = tmp_path / "a.zip", [60.0, 0.5]
    door.pack(ROOT / "infra", [], package)

    async def take(request):
        if request.method == "PUT":
            await asyncio.sleep(naps.pop(0))
        return aiohttp.web.Response(status=200 if request.method == "PUT" else 404)

    name = get_uri_for_package(package).removeprefix("gcs://")
    server.answers |= {f"/api/packages/gcs/{name}": take, "/api/jobs/": (200, '{"job_id": "a", "submission_id": "a"}')}
    monkeypatch.setattr(door, "ANSWER_S", 0.2)
    monkeypatch.setattr(door, "SLOWEST", 1e9)
    with pytest.raises(Away, match=r"does not answer \(ReadTimeout\)"):
        jobs.submit("a", "x", package, {}, {}, {}, {})
    monkeypatch.setattr(door, "SLOWEST", package.stat().st_size / 30)
    jobs.submit("a", "x", package, {}, {}, {}, {})
    assert [method for method, path, _ in server.asked if path == "/api/jobs/"] == ["POST"]


async def one_line(request):
    """A log."""
    socket = aiohttp.web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_str("x\n")
    await socket.close()
    return socket


def test_another_machine_is_reached_through_the_proxy_of_the_shell_its_logs_too(server, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    server.answers |= {"/api/jobs/": (200, "[]"), "/api/jobs/a/logs/tail": one_line}
    jobs = door.Jobs("http://h.invalid:8265", TOKEN)
    assert (jobs.all(), list(jobs.tail("a"))) == ([], ["x\n"])


@pytest.mark.parametrize("token", [TOKEN, NONE])
def test_neither_the_proxy_nor_the_password_of_the_shell_reaches_this_machine(server, monkeypatch, tmp_path, token):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path))
    services.create_private(tmp_path / ".netrc", "default login me password pw\n")
    server.answers |= {"/api/jobs/": (200, "[]"), "/api/jobs/a/logs/tail": one_line}
    jobs = door.Jobs(server.url, token)
    assert (jobs.all(), list(jobs.tail("a"))) == ([], ["x\n"])
    assert {shown for _, _, shown in server.asked} == {token.headers.get("Authorization", "")}


def test_a_log_that_falls_silent_or_breaks_ends(server, jobs, monkeypatch):
    sent = [["a\n", "b"], ["a\n"]]

    async def tail(request):
        socket = aiohttp.web.WebSocketResponse()
        await socket.prepare(request)
        for text in sent.pop(0):
            await socket.send_str(text)
        if sent:
            await asyncio.sleep(60)  # a connection that is cut off and does not know it
        request.transport.abort()
        return socket

    server.answers["/api/jobs/a/logs/tail"] = tail
    monkeypatch.setattr(door, "SILENT_S", 0.3)
    assert list(jobs.tail("a")) == ["a\n", "b"]
    assert list(jobs.tail("a")) == ["a\n"]


def test_a_log_without_websockets_is_read_whole(server, jobs):
    server.answers |= {"/api/jobs/a/logs/tail": (502, "Bad Gateway"), "/api/jobs/a/logs": (200, '{"logs": "a\\nb"}')}
    with pytest.raises(door.NoTail, match=rf"no websocket to {server.url} \(HTTP 502\)"):
        list(jobs.tail("a"))
    assert jobs.log("a") == "a\nb"
    server.close()
    with pytest.raises(door.NoTail, match=r"\(.*onnect.*\)"):
        list(jobs.tail("a"))
