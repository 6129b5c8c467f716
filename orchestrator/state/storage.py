"""A folder or a bucket, alike: small named objects that are written whole or not at all.

obstore speaks both. A local object is staged and renamed, so a killed writer leaves the old object or none; power loss
may still tear it, which is why checkpoints carry hashes.
"""

from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from pipelines.errors import ClusterError


class Storage:
    """Objects under one folder or URL (`s3://`, `gs://`, `az://`; credentials from the usual environment)."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._store: ObjectStore = _open(place)

    def write(self, name: str, data: bytes) -> None:
        """Puts the object, in place of any older one."""
        try:
            obstore.put(self._store, name, data)
        except (OSError, BaseError) as error:
            raise ClusterError(_sentence("written", self.place, name, error)) from error

    def create(self, name: str, data: bytes) -> bool:
        """Puts the object only where there is none; False where there is one."""
        try:
            obstore.put(self._store, name, data, mode="create")
        except AlreadyExistsError:
            return False
        except (OSError, BaseError) as error:
            raise ClusterError(_sentence("written", self.place, name, error)) from error
        return True

    def read(self, name: str) -> bytes | None:
        """The object's bytes; None where there is none."""
        try:
            return bytes(obstore.get(self._store, name).bytes())
        except FileNotFoundError:
            return None
        except (OSError, BaseError) as error:
            raise ClusterError(_sentence("read", self.place, name, error)) from error

    def names(self, prefix: str = "") -> list[str]:
        """All objects below `prefix`, sorted."""
        try:
            return sorted(item["path"] for batch in obstore.list(self._store, prefix) for item in batch)
        except (OSError, BaseError) as error:
            raise ClusterError(_sentence("listed", self.place, prefix, error)) from error

    def remove(self, name: str) -> None:
        """One object; nothing happens where there is none."""
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError:
            return
        except (OSError, BaseError) as error:
            raise ClusterError(_sentence("removed", self.place, name, error)) from error

    def remove_all(self, prefix: str) -> None:
        """All objects below `prefix`."""
        for name in self.names(prefix):
            self.remove(name)


def _open(place: str) -> ObjectStore:
    try:
        if "://" in place:
            return from_url(place)
        return LocalStore(prefix=Path(place), automatic_cleanup=True, mkdir=True)
    except (OSError, ValueError, BaseError) as error:
        raise ClusterError(_sentence("opened", place, "", error)) from error


def _sentence(verb: str, place: str, name: str, error: Exception) -> str:
    cause = str(error).split("\n")[0]
    return f"cluster.storage: {place}{'/' + name if name else ''} cannot be {verb}: {cause}"
