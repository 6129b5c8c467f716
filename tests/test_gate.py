"""Who is let in to a cluster: the address, the token in its file, and a server that is asked before it is shown one."""

import asyncio
import re
from pathlib import Path

import pytest

from orchestrator.cluster import gate, services
from pipelines.errors import ClusterError, ConfigError
from tests.dashboard import NONE, SECRET, TOKEN, Server


@pytest.fixture
def token_file(tmp_path) -> Path:
    path = tmp_path / "token"
    services.create_private(path, SECRET + "\n")
    return path


@pytest.fixture
def server():
    with Server() as made:
        yield made


@pytest.mark.parametrize(
    ("asked", "api", "ray", "found"),
    [
        ("http://a:8265/", "http://b", "http://c", "http://a:8265"),
        ("", "https://b/ray", "http://c", "https://b/ray"),
        ("", "", "http://c:1", "http://c:1"),
        ("", "", "127.0.0.1:6379", None),
        ("", "", "", None),
        ("a:8265", "", "", None),
        ("http://me:pw@a", "", "", None),
        ("ray://a:10001", "", "", None),
    ],
)
def test_the_address(asked, api, ray, found):
    environ = {"RAY_API_SERVER_ADDRESS": api, "RAY_ADDRESS": ray}
    if found:
        assert gate.address(asked, environ) == found
        return
    name = "--address" if asked or not ray else "RAY_ADDRESS"
    with pytest.raises(ConfigError, match=f"^{name} is '{asked or ray}'; give --address http://HOST:8265"):
        gate.address(asked, environ)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "RAY_AUTH_MODE is ''; a cluster is used with its token: .* --insecure does without"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled'"),
        ({"RAY_AUTH_TOKEN": SECRET}, "RAY_AUTH_TOKEN is set, and every process that this shell starts can read it"),
        ({"RAY_AUTH_TOKEN_PATH": "/none"}, r"RAY_AUTH_TOKEN_PATH is /none, which cannot be read \(No such file"),
        ({"mode": 0o640}, "of mode 0640, which lets others read the token; chmod 600 it"),
        ({"mode": 0o604}, "of mode 0604"),
        ({"text": ""}, "which holds no token"),
        ({"text": "two words"}, "which holds no token"),
    ],
)
def test_tokens_that_are_refused(token_file, environ, words):
    environ = {"RAY_AUTH_TOKEN_PATH": str(token_file)} | environ
    if "text" in environ:
        token_file.write_text(environ["text"])
    token_file.chmod(environ.get("mode", 0o600))
    if not words.startswith("RAY_AUTH_MODE"):
        environ["RAY_AUTH_MODE"] = "token"
    with pytest.raises(ConfigError, match=words) as caught:
        gate.token(environ, insecure=False)
    assert SECRET not in str(caught.value)


def test_tokens_that_are_taken(token_file, monkeypatch, tmp_path):
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    assert gate.token(environ, insecure=False) == gate.Token(SECRET, str(token_file))
    assert gate.token({}, insecure=True).headers == {}
    token_file.chmod(0o644)
    assert gate.token(environ, insecure=True).secret == SECRET
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    services.create_private(tmp_path / ".ray" / "auth_token", "other")
    assert gate.token({"RAY_AUTH_MODE": "token"}, insecure=False).headers == {"Authorization": "Bearer other"}


OPEN, CLOSED = (200, '{"authentication_mode": "disabled"}'), (200, '{"authentication_mode": "token"}')


@pytest.mark.parametrize(
    ("mode", "token", "insecure", "words"),
    [
        (CLOSED, TOKEN, False, ""),
        (CLOSED, TOKEN, True, ""),
        (OPEN, NONE, True, "^warning: the cluster at .* asks for no token: whoever reaches it can run commands"),
        (
            OPEN,
            TOKEN,
            False,
            "asks for no token: .*; start its nodes with infra/start.sh, .* accept that with --insecure",
        ),
        (CLOSED, NONE, True, "asks for a token, and --insecure without RAY_AUTH_MODE=token gives none"),
        ((404, "<html>"), TOKEN, False, r"answers, but not as Ray's dashboard does \(HTTP 404 .* not MLflow's"),
        ((200, "<html>"), TOKEN, False, r"not as Ray's dashboard does \(HTTP 200"),
        ((302, ""), TOKEN, False, r"not as Ray's dashboard does \(HTTP 302"),
        ((401, "Basic"), TOKEN, False, r"not as Ray's dashboard does \(HTTP 401"),
        ((200, "[]"), TOKEN, False, "not as Ray's dashboard does"),
    ],
)
def test_a_server_is_asked_before_it_is_shown_the_token(server, mode, token, insecure, words):
    server.answers[gate.MODE] = mode
    if not words or words.startswith("^warning"):
        assert re.search(words, gate.ask(server.url, token, insecure))
    else:
        with pytest.raises(ClusterError, match=words):
            gate.ask(server.url, token, insecure)
    assert server.asked == [("GET", gate.MODE, "")]


def test_nobody_answers():
    with pytest.raises(ClusterError, match=r"nobody answers at http://127.0.0.1:1 \(Connection refused\); start the"):
        gate.ask("http://127.0.0.1:1", TOKEN, False)


def test_a_silent_server_is_not_waited_for_for_ever(server, monkeypatch):
    async def sleep(_):
        await asyncio.sleep(60)

    server.answers[gate.MODE] = sleep
    monkeypatch.setattr(gate, "ANSWER_S", 0.2)
    with pytest.raises(ClusterError, match=r"nobody answers at .* \(ReadTimeout\)"):
        gate.ask(server.url, TOKEN, False)
