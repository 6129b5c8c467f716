"""What MLflow's failures mean: those that pass, and those that stay."""

import contextlib
from collections.abc import Iterator

from pipelines.errors import SkiplaneError

# Trying again cannot help: the request itself is wrong, or what it is about is gone.
PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE")
# The server asks who is there. Somebody may put it right, so for points of a run this passes.
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")
BUSY = (429, 502, 503, 504)  # of whatever stands before the server


class Unreachable(Exception):
    """The server is away, slow or ill: the same records may go through later."""


class Denied(Unreachable):
    """The server wants another user, or another password."""


class Waiting(Unreachable):
    """The server has nothing to do with it: another run comes first."""


class Refused(Exception):
    """The server will never take this."""


@contextlib.contextmanager
def told(artifacts: bool = False) -> Iterator[None]:
    """Raises every failure of MLflow as Unreachable, Denied or Refused, in one short line.

    artifacts: they may lie elsewhere than the server, so what is wrong there must not hold up what comes after.
    """
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (Unreachable, Refused, SkiplaneError):
        raise
    except MlflowException as error:
        raise _kind(error.error_code)(line(error)) from error
    except requests.HTTPError as error:
        passes = error.response is not None and error.response.status_code in BUSY
        raise (Unreachable if passes or not artifacts else Refused)(line(error)) from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Unreachable(line(error)) from error
    except Exception as error:
        raise (Refused if artifacts else Unreachable)(line(error)) from error


def _kind(code: str) -> type[Exception]:
    return Refused if code in PERMANENT else Denied if code in DENIED else Unreachable


def line(error: Exception) -> str:
    """What an error says, short: requests wraps a refused connection in three layers of its own words."""
    text = str(error)
    for telling in ("Connection refused", "Read timed out", "Connection reset", "Name or service not known"):
        if telling in text:
            return telling.lower()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
