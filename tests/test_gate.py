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
        (
            {"RAY_AUTH_TOKEN": SECRET},
            "RAY_AUTH_TOKEN is set, and every .* taken in a pod of Kubernetes alone; unset it",
        ),
        ({"RAY_AUTH_TOKEN": "a b", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "^RAY_AUTH_TOKEN holds no token"),
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
    pod = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert gate.token(pod, insecure=False) == gate.Token(SECRET, "RAY_AUTH_TOKEN")  # as KubeRay gives it
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


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxied(monkeypatch, tmp_path):
    """A shell with a proxy where nobody answers, and with a password for every host in ~/.netrc."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://me:pw@127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path))
    services.create_private(tmp_path / ".netrc", "default login me password pw\n")
    return monkeypatch


def test_this_machine_is_reached_without_the_proxy_and_the_password_of_the_shell(server, proxied):
    server.answers[gate.MODE] = CLOSED
    assert gate.ask(server.url, TOKEN, False) == ""
    assert server.asked == [("GET", gate.MODE, "")]


@pytest.mark.parametrize(
    ("url", "by"),
    [
        ("http://127.0.0.1:8265", ""),
        ("http://127.1.2.3:8265", ""),
        ("http://localhost:8265", ""),
        ("http://[::1]:8265", ""),
        ("http://127.example.com", "http://me:pw@127.0.0.1:1"),
        ("http://h:8265", "http://me:pw@127.0.0.1:1"),
        ("http://near:8265", ""),
        ("https://h", ""),
    ],
)
def test_whose_proxy(proxied, url, by):
    proxied.setenv("no_proxy", "near")
    assert gate.proxy(url) == by


def test_a_proxy_that_can_read_the_token_is_told(proxied):
    with Server() as proxy:
        proxied.setenv("http_proxy", proxy.url.replace("//", "//me:pw@"))
        proxy.answers[gate.MODE] = CLOSED
        warning = gate.ask("http://h:8265", TOKEN, False)
    assert warning.startswith(
        "warning: http://h:8265 is reached through 127.0.0.1, the http_proxy of this shell, which"
    )
    assert "pw" not in warning
    assert len(proxy.asked) == 1


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
