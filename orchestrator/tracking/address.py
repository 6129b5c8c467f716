"""Where MLflow is: may the URI be used, does anybody answer, and how is it shown."""

import http.client
import queue
import socket
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit, urlunsplit

from pipelines.errors import ClusterError, ConfigError

PROBE_S = 6.0  # for an answer at the start; with a request after it, a dead server is known within 10 s
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306}


def answers(uri: str) -> None:
    """Raises ConfigError for a URI that cannot be used, ClusterError where nobody answers there; writes nothing."""
    check(uri)
    probe(uri)


def check(uri: str) -> None:
    """Raises ConfigError for a URI that cannot be used."""
    scheme = uri.partition(":")[0]
    try:
        urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"tracking.uri is {uri}, which is no URL ({error}); use http(s)://HOST:PORT") from error
    if scheme == "sqlite" and not uri.startswith("sqlite:////"):
        raise ConfigError(f"tracking.uri is {uri}; an absolute path is needed (sqlite:////home/me/mlflow.db): a job "
                          f"runs in another folder")  # fmt: skip
    if scheme.partition("+")[0] not in ("http", "https", "sqlite", *DATABASE_PORTS):
        raise ConfigError(f"tracking.uri is {without_password(uri)}; use http(s)://HOST:PORT of an MLflow server, or "
                          f"sqlite:////ABSOLUTE/mlflow.db (MLflow's plain folders are out of service)")  # fmt: skip


def probe(uri: str) -> None:
    """Raises ClusterError where nobody answers at a server's address; a file is not asked.

    In a thread, because no timeout covers looking up a name.
    """
    if uri.startswith("sqlite:"):
        return
    answer: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: answer.put(_ask(uri)), name="skiplane-probe", daemon=True).start()
    try:
        cause = answer.get(timeout=PROBE_S + 1)
    except queue.Empty:
        cause = f"no answer within {PROBE_S:.0f} s"
    if cause:
        shown, settings = without_password(uri), "tracking.uri or MLFLOW_TRACKING_URI"
        raise ClusterError(f"MLflow at {shown} does not answer ({cause}); start it (python -m jobs.local up), correct "
                           f"{settings}, or set tracking.uri to off")  # fmt: skip


def _ask(uri: str) -> str:
    """Why there was no answer; nothing where there was."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            urllib.request.urlopen(f"{without_password(uri).rstrip('/')}/health", timeout=PROBE_S).close()
        else:
            port = parts.port or DATABASE_PORTS[parts.scheme.partition("+")[0]]
            socket.create_connection((parts.hostname or "localhost", port), timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        return f"status {error.code}" if error.code >= 500 else ""  # it may ask for a password here
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def without_password(uri: str) -> str:
    """The URI as it may be shown: user and password are left out."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri
