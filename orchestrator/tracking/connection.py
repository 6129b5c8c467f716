"""A client of MLflow at one URI: patience is ours, one process makes SQLite's schema, artifacts have a place."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REQUEST_S = 10  # for one request


def load() -> Any:
    """MLflow's client class, told to give up at once: trying again is the shipper's work, with its own pauses."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(REQUEST_S)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient


def connect(uri: str) -> Any:
    """A client."""
    client = load()
    if not uri.startswith(("http://", "https://")):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # its own pauses add up to 102 s, of a wrong password too
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with alone(uri):
        return client(tracking_uri=uri)


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """One process at a time makes a SQLite schema: of six that tried together, five died."""
    if not uri.startswith("sqlite:"):
        yield
        return
    with open(uri.removeprefix("sqlite:///") + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def artifacts(uri: str) -> str | None:
    """Beside a SQLite file: MLflow's own choice would be the current folder. A server has its own place."""
    if not uri.startswith("sqlite:"):
        return None
    return Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
