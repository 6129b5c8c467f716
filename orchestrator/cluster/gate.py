"""Who is let in to a cluster: its dashboard and the way there, its token, and whether the server asks for it."""

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.submission import of_this_machine
from pipelines.errors import ClusterError, ConfigError

DEFAULT_TOKEN = "~/.ray/auth_token"
ANSWER_S = 20.0  # that a server has for an answer: one that is cut off gives none
MODE = "/api/authentication_mode"  # answered without a token
HOW = (
    "a cluster is used with its token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH names a file of mode 0600 that "
    "holds it (source ~/.skiplane/local/env.sh sets both for `jobs.local`); --insecure does without"
)


@dataclass(frozen=True)
class Token:
    """A cluster's token and where it came from; both empty where none is used."""

    secret: str = ""
    file: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What a request carries."""
        return {"Authorization": f"Bearer {self.secret}"} if self.secret else {}

    def __call__(self, request: Any) -> Any:
        """Signs a request of `requests`, which takes a password out of ~/.netrc where nobody else signs."""
        request.headers.update(self.headers)
        return request


def address(asked: str, environ: Mapping[str, str]) -> str:
    """The dashboard's URL: --address, RAY_API_SERVER_ADDRESS, or RAY_ADDRESS where that is one.

    Raises ConfigError where there is none, or where it is no URL.
    """
    known = {
        "--address": asked,
        "RAY_API_SERVER_ADDRESS": environ.get("RAY_API_SERVER_ADDRESS", ""),
        "RAY_ADDRESS": environ.get("RAY_ADDRESS", ""),
    }
    name, found = next(((name, value) for name, value in known.items() if value), ("--address", ""))
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", found):
        return found.rstrip("/")
    raise ConfigError(
        f"{name} is '{found}'; give --address http://HOST:8265, where the head's dashboard is "
        f"(`python -m jobs.local up` makes a cluster of this machine)"
    )


def token(environ: Mapping[str, str], insecure: bool) -> Token:
    """The token that the environment names. Raises ConfigError where there is none, or where others can read it;
    `insecure` takes what there is."""
    if insecure and environ.get("RAY_AUTH_MODE") != "token":
        return Token()
    if (mode := environ.get("RAY_AUTH_MODE", "")) != "token":
        raise ConfigError(f"RAY_AUTH_MODE is '{mode}'; {HOW}")
    if shown := environ.get("RAY_AUTH_TOKEN", ""):
        if environ.get("KUBERNETES_SERVICE_HOST"):  # KubeRay gives its pods the token in this form alone
            return Token(_checked(shown, "RAY_AUTH_TOKEN"), "RAY_AUTH_TOKEN")
        raise ConfigError(f"RAY_AUTH_TOKEN is set, and every process that this shell starts can read it; it is taken "
                          f"in a pod of Kubernetes alone; unset it here; {HOW}")  # fmt: skip
    named = environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_TOKEN
    return Token(_read(Path(named).expanduser(), insecure), named)


def _read(path: Path, insecure: bool) -> str:
    try:
        mode, secret = stat.S_IMODE(path.stat().st_mode), path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {path}, which cannot be read ({why(error)}); {HOW}") from error
    if mode & 0o077 and not insecure:
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH is {path}, of mode {mode:04o}, which lets others read the token; chmod 600 it, and "
            f"make a new token if others were here"
        )
    return _checked(secret, f"RAY_AUTH_TOKEN_PATH is {path}, which")


def _checked(secret: str, what: str) -> str:
    if not re.fullmatch(r"[!-~]+", secret):
        raise ConfigError(f"{what} holds no token (one line without spaces); {HOW}")
    return secret


def proxy(url: str) -> str:
    """The proxy that the shell names for that server; empty where there is none, and for this machine: what listens
    here is not reached through another one."""
    from requests.utils import get_environ_proxies, select_proxy

    return "" if of_this_machine(url) else select_proxy(url, get_environ_proxies(url)) or ""


def manner(url: str, token: Token) -> dict[str, Any]:
    """What `requests` is told with every request to that server: who asks, and the way."""
    return {"auth": token, "proxies": {"no_proxy": urlsplit(url).hostname} if of_this_machine(url) else {}}


def ask(url: str, found: Token, insecure: bool) -> str:
    """Asks the server whether it wants a token, before it is shown one; a warning for people, empty where all is well.

    Raises ClusterError where nobody answers, where it is no dashboard of Ray, and where its answer and the token do
    not fit together.
    """
    mode = _mode(url)
    if mode != "disabled":
        if not found.secret:
            raise ClusterError(f"the cluster at {url} asks for a token, and --insecure without RAY_AUTH_MODE=token "
                               f"gives none; {HOW}")  # fmt: skip
        return _overheard(url)
    open_to_all = f"the cluster at {url} asks for no token: whoever reaches it can run commands on its nodes"
    if not insecure:
        raise ClusterError(f"{open_to_all}; start its nodes with infra/start.sh, which requires one, or accept that "
                           f"with --insecure")  # fmt: skip
    return f"warning: {open_to_all}"


def _overheard(url: str) -> str:
    by = proxy(url)
    if not by or url.startswith("https:"):
        return ""
    return (f"warning: {url} is reached through {urlsplit(by).hostname}, the http_proxy of this shell, which can read "
            f"the token; name the host in no_proxy, or use https or `ssh -L`")  # fmt: skip


def _mode(url: str) -> str:
    import requests

    try:
        answer = requests.get(f"{url}{MODE}", timeout=ANSWER_S, allow_redirects=False, **manner(url, Token()))
    except (OSError, ValueError) as error:  # what requests raises is an OSError; a port of 99999 a ValueError
        raise ClusterError(
            f"nobody answers at {url} ({why(error)}); start the cluster (or the port-forward, or ssh -L), or correct "
            f"--address"
        ) from error
    try:
        return str(answer.json()["authentication_mode"])
    except (ValueError, TypeError, KeyError) as error:
        raise ClusterError(
            f"{url} answers, but not as Ray's dashboard does (HTTP {answer.status_code} for {MODE}); --address is the "
            f"dashboard's, by default port 8265 of the head, not MLflow's or Ray's own port"
        ) from error


def why(error: BaseException) -> str:
    """What the operating system said, of however many errors it is wrapped in."""
    found: BaseException | None = error
    while found:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return type(error).__name__  # such as ReadTimeout
