"""Where MLflow is: may the URI be used, does anybody answer, and how is it shown."""

import queue
import socket
import threading
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit, urlunsplit

from orchestrator.tracking.access import AUTHORITY, Access, denied
from pipelines.errors import ClusterError, ConfigError, SkiplaneError

PROBE_S = 6.0  # for an answer at the start; with a request after it, a dead server is known within 10 s
QUESTION = "/api/2.0/mlflow/experiments/search?max_results=1"  # /health answers without a password, and no database
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306}


def answers(uri: str) -> None:
    """Raises ConfigError for a URI that cannot be used, ClusterError where nobody answers there; writes nothing.

    A no is an answer: what is on its way to a server waits for a password, and is not given up.
    """
    check(uri)
    probe(uri, enter=False)


def check(uri: str) -> None:
    """Raises ConfigError for a URI that cannot be used."""
    scheme = uri.partition(":")[0]
    try:
        urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"tracking.uri is no URL ({error}); use http(s)://HOST:PORT") from error
    if scheme == "sqlite" and not uri.startswith("sqlite:////"):
        raise ConfigError(f"tracking.uri is {uri}; an absolute path is needed (sqlite:////home/me/mlflow.db): a job "
                          f"runs in another folder")  # fmt: skip
    if scheme.partition("+")[0] not in ("http", "https", "sqlite", *DATABASE_PORTS):
        raise ConfigError(f"tracking.uri is {without_password(uri)}; use http(s)://HOST:PORT of an MLflow server, or "
                          f"sqlite:////ABSOLUTE/mlflow.db (MLflow's plain folders are out of service)")  # fmt: skip


def probe(uri: str, enter: bool = True) -> None:
    """Raises ClusterError where nobody answers at a server's address, and ConfigError where the certificate is not
    trusted or, to `enter`, this user is not let in; a file is not asked.

    In a thread, because no timeout covers looking up a name.
    """
    if uri.startswith("sqlite:"):
        return
    http = uri.startswith(("http://", "https://"))
    ask = partial(_ask_server, enter=enter) if http else _ask_database
    answer: queue.Queue[SkiplaneError | str] = queue.Queue()
    threading.Thread(target=lambda: answer.put(_heard(ask, uri)), name="skiplane-probe", daemon=True).start()
    try:
        said = answer.get(timeout=PROBE_S + 1)
    except queue.Empty:
        said = f"no answer within {PROBE_S:.0f} s"
    if isinstance(said, SkiplaneError):
        raise said
    if said:
        shown, settings = without_password(uri), "tracking.uri or MLFLOW_TRACKING_URI"
        raise ClusterError(f"MLflow at {shown} does not answer ({said}); start it (python -m jobs.local up), correct "
                           f"{settings}, or set tracking.uri to offline or off")  # fmt: skip


def _heard(ask: Callable[[str], str], uri: str) -> SkiplaneError | str:
    try:
        return ask(uri)
    except SkiplaneError as error:
        return error
    except Exception as error:  # whoever waits must hear something
        return _cause(error)


def _ask_server(uri: str, enter: bool) -> str:
    """Why there was no answer; nothing where there was. As MLflow asks: with its variables, by its HTTP library."""
    import requests

    access, shown = Access.to(uri), without_password(uri)
    try:
        answer = requests.get(f"{uri.rstrip('/')}{QUESTION}", timeout=PROBE_S, headers=access.header,
                              verify=access.verify, cert=access.certificate or None)  # fmt: skip
    except requests.exceptions.SSLError as error:
        raise ConfigError(f"MLflow at {shown} is not trusted ({_cause(error)}); set {AUTHORITY} to the file of its "
                          f"authority's certificate") from error  # fmt: skip
    if enter and answer.status_code in (401, 403) and not access.other_way:
        raise denied(answer.status_code, shown, access)
    return f"status {answer.status_code}" if answer.status_code >= 500 else ""


def _ask_database(uri: str) -> str:
    parts = urlsplit(uri)
    port = parts.port or DATABASE_PORTS[parts.scheme.partition("+")[0]]
    socket.create_connection((parts.hostname or "localhost", port), timeout=PROBE_S).close()
    return ""


def _cause(error: BaseException) -> str:
    """What went wrong at the bottom: requests wraps it three times."""
    said, inner = error, error.__cause__ or error.__context__
    while inner is not None:
        said, inner = inner if isinstance(inner, OSError) else said, inner.__cause__ or inner.__context__
    if isinstance(said, TimeoutError) or "timed out" in str(said):
        return "timed out"
    return getattr(said, "strerror", None) or type(said).__name__


def without_password(uri: str) -> str:
    """The URI as it may be shown: user and password are left out."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri
