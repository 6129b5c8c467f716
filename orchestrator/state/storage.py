"""A folder or a bucket, alike: small named objects that are written whole or not at all.

obstore speaks both. A local object is staged and renamed, so a killed writer leaves the old object or none; power loss
may still tear it, which is why checkpoints carry hashes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from pipelines.errors import ClusterError


class Storage:
    """Objects under one folder or URL (`s3://`, `gs://`, `az://`; credentials from the usual environment).

    A folder is made by the first write; until then it reads as empty.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._folder = None if "://" in place else Path(place)
        self._opened: ObjectStore | None = None

    def write(self, name: str, data: bytes) -> None:
        """Puts the object, in place of any older one."""
        with self._told("written", name):
            obstore.put(self._store(), name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Puts the object only where there is none; False where there is one."""
        with self._told("written", name):
            try:
                obstore.put(self._store(), name, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def read(self, name: str) -> bytes | None:
        """The object's bytes; None where there is none."""
        if self._absent():
            return None
        with self._told("read", name):
            try:
                return bytes(obstore.get(self._store(), name).bytes())
            except FileNotFoundError:
                return None

    def names(self, prefix: str = "") -> list[str]:
        """All objects below the folder `prefix`, sorted."""
        if self._absent():
            return []
        with self._told("listed", prefix):
            return sorted(item["path"] for batch in obstore.list(self._store(), prefix) for item in batch)

    def remove(self, name: str) -> None:
        """One object; nothing happens where there is none."""
        with self._told("removed", name), suppress(FileNotFoundError):
            obstore.delete(self._store(), name)

    def remove_all(self, prefix: str) -> None:
        """All objects below the folder `prefix`."""
        for name in self.names(prefix):
            self.remove(name)

    def _absent(self) -> bool:
        return self._folder is not None and not self._folder.is_dir()

    def _store(self) -> ObjectStore:
        if self._opened is None:
            folder = self._folder
            self._opened = LocalStore(folder, automatic_cleanup=True, mkdir=True) if folder else from_url(self.place)
        return self._opened

    @contextmanager
    def _told(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, BaseError) as error:
            raise ClusterError(_sentence(verb, self.place, name, error)) from error


def _sentence(verb: str, place: str, name: str, error: Exception) -> str:
    cause = str(error).split("\n")[0]
    return f"cluster.storage: {place}{'/' + name if name else ''} cannot be {verb}: {cause}"
