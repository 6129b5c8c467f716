"""What MLflow's failures mean: those that pass, and those that stay."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from pipelines.errors import SkiplaneError

# Trying again cannot help: the request itself is wrong, or what it is about is gone.
PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
# MLflow says BAD_REQUEST for whatever its database says, also when that has run out of connections or is being moved;
# this in the text is SQLAlchemy's name for a value that the database cannot hold, such as a NUL in PostgreSQL.
BAD_VALUE = re.compile(r"sqlalche\.me/e/\d+/9h9h")
TIMED_OUT = "read timed out"
TOO_LARGE = "error code 413"  # by a proxy: in halves it goes through
# The server asks who is there. Somebody may put it right, so for points of a run this passes.
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")
WRONG = (400, 404, 413)  # statuses of a store of artifacts that mean that this one will never be taken


class Unreachable(Exception):
    """The server is away, slow or ill: the same records may go through later."""


class Denied(Unreachable):
    """The server wants another user, or another password."""


class Unstored(Unreachable):
    """The server answers, and where its artifacts lie does not take one now."""


class Waiting(Unreachable):
    """The server has nothing to do with it: another run comes first."""


class Refused(Exception):
    """The server will never take this."""


@contextlib.contextmanager
def told(artifacts: bool = False) -> Iterator[None]:
    """Raises every failure of MLflow as Unreachable, Denied or Refused, in one short line.

    artifacts: they may lie elsewhere than the server, with a password, a disk and outages of their own: all but a
    plain no passes.
    """
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (Unreachable, Refused, SkiplaneError):
        raise
    except MlflowException as error:
        raise _kind(error)(line(error)) from error
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        denied = Denied if status in (401, 403) else Unreachable
        raise (Refused if artifacts and status in WRONG else denied)(line(error)) from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Unreachable(line(error)) from error
    except Exception as error:
        raise (Refused if _wrong(error) and not artifacts else Unreachable)(line(error)) from error


def _kind(error: Any) -> type[Exception]:
    text = str(error)
    if error.error_code in PERMANENT or TOO_LARGE in text or BAD_VALUE.search(text) or _wrong(error.__cause__):
        return Refused
    return Denied if error.error_code in DENIED else Unreachable


def _wrong(error: BaseException | None) -> bool:
    """Whether it is about a value: bytes that are no text, a number beyond 64 bits (protobuf's plain ValueError)."""
    return isinstance(error, (UnicodeError, OverflowError)) or type(error) is ValueError


def line(error: Exception) -> str:
    """What an error says, short: requests wraps a refused connection in three layers of its own words."""
    text = str(error)
    for telling in ("Connection refused", TIMED_OUT.capitalize(), "Connection reset", "Name or service not known"):
        if telling in text:
            return telling.lower()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
