"""A tar by its path or URL as a local file that can be read anywhere, and its hash."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pipelines.errors import ConfigError, DataError
from pipelines.remote.objects import Objects
from pipelines.remote.url import is_url


@contextmanager
def opened(where: str, size: int, endpoint: str = "") -> Iterator[tuple[BinaryIO, str]]:
    """(file, sha256 in hex). A remote tar lies in a file without a name meanwhile: gone with this process in any case.

    Raises DataError where it cannot be read, ConfigError where TMPDIR has no room for it.
    """
    if is_url(where):
        with tempfile.TemporaryFile() as file:
            digest = hashlib.sha256()
            for part in Objects(endpoint).parts(where, size):
                digest.update(part)
                _write(file, part)
            yield file, digest.hexdigest()
        return
    try:
        with open(where, "rb") as local:
            yield local, hashlib.file_digest(local, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}; repair it") from error


def _write(file: BinaryIO, part: bytes) -> None:
    try:
        file.write(part)
    except OSError as error:
        raise ConfigError(
            f"TMPDIR is {tempfile.gettempdir()}, which cannot be written: {error.strerror}; it needs room for a tar of "
            "the source for each worker"
        ) from error
