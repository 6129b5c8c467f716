"""Where MLflow is: may the URI be used, does anybody answer, and how is it shown."""

import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit, urlunsplit

from pipelines.errors import ClusterError, ConfigError

PROBE_S = 6.0  # for an answer at the start; with a request after it, a dead server is known within 10 s


def check(uri: str) -> None:
    """Raises ConfigError for a URI that cannot be used."""
    scheme = uri.partition(":")[0]
    if scheme == "sqlite" and not uri.startswith("sqlite:////"):
        raise ConfigError(f"tracking.uri is {uri}; an absolute path is needed (sqlite:////home/me/mlflow.db): a job "
                          f"runs in another folder")  # fmt: skip
    if scheme.partition("+")[0] not in ("http", "https", "sqlite", "postgresql", "mysql"):
        raise ConfigError(f"tracking.uri is {without_password(uri)}; use http(s)://HOST:PORT of an MLflow server, or "
                          f"sqlite:////ABSOLUTE/mlflow.db (MLflow's plain folders are out of service)")  # fmt: skip


def probe(uri: str) -> None:
    """Raises ClusterError where a server does not answer at all. In a thread: no timeout covers looking up a name."""
    shown = without_password(uri)
    failure: list[str] = [f"no answer within {PROBE_S:.0f} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=PROBE_S).close()
        except urllib.error.HTTPError as error:
            failure[:] = [f"status {error.code}"] if error.code >= 500 else []
        except (OSError, ValueError) as error:
            failure[:] = [str(getattr(error, "reason", error))]
        else:
            failure.clear()

    thread = threading.Thread(target=ask, name="skiplane-probe", daemon=True)
    thread.start()
    thread.join(PROBE_S + 1)
    if failure:
        raise ClusterError(f"MLflow at {shown} does not answer ({failure[0]}); start it (python -m jobs.local up), "
                           f"correct tracking.uri or MLFLOW_TRACKING_URI, or set tracking.uri to off")  # fmt: skip


def without_password(uri: str) -> str:
    """The URI as it may be shown: user and password are left out."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri
