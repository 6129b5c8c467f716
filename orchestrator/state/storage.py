"""A folder or a bucket, alike: small named objects that are written whole or not at all.

They lie behind `pipelines/remote/store.py`; here a failure becomes a sentence about cluster.storage. Power loss may
tear a local object, which is why checkpoints carry hashes.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from pipelines.errors import ClusterError
from pipelines.remote.failures import NotThere, StoreError
from pipelines.remote.patience import REQUEST_S, Patience
from pipelines.remote.store import Store

T = TypeVar("T")
WAIT_S = 120.0  # for a bucket that does not answer


class Storage:
    """Objects under one folder or URL (`s3://`, `gs://`, `az://`; credentials from the usual environment).

    A folder is made by the first write; until then it reads as empty.
    """

    def __init__(self, place: str, wait_s: float = WAIT_S, answer_s: float = REQUEST_S) -> None:
        """wait_s: how long a request is tried; answer_s: how long one try may take."""
        self.place = place
        self._store = Store(place, request_s=answer_s)
        self._patience = Patience(wait_s)

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Puts the object, in place of any older one."""
        self._told(lambda: self._store.write(name, data))

    def create(self, name: str, data: bytes) -> bool:
        """Puts the object only where there is none; False where there is another one.

        Where it has these very bytes it counts as put: a try whose answer was lost. So let them be nobody else's.
        """
        return self._told(lambda: self._store.create(name, data)) or self.read(name) == data

    def read(self, name: str) -> bytes | None:
        """The object's bytes; None where there is none."""
        try:
            return self._told(lambda: self._store.read(name))
        except ClusterError as error:
            if isinstance(error.__cause__, NotThere):
                return None
            raise

    def names(self, prefix: str = "") -> list[str]:
        """All objects below the folder `prefix`, sorted."""
        return self._told(lambda: self._store.names(prefix))

    def remove(self, name: str) -> None:
        """One object; nothing happens where there is none."""
        self._told(lambda: self._store.remove(name))

    def folders(self, prefix: str) -> dict[str, list[str]]:
        """The folders right below the folder `prefix`, each with its objects, from one listing; see Store.folders."""
        return self._told(lambda: self._store.folders(prefix))

    def remove_folder(self, folder: str, names: Sequence[str]) -> None:
        """A folder whose objects are `names`."""
        self._told(lambda: self._store.remove_folder(folder, names))

    def free(self) -> int | None:
        """Bytes free where the objects lie; None for a bucket."""
        return self._told(self._store.free)

    def _told(self, request: Callable[[], T]) -> T:
        try:
            return self._patience(request)
        except StoreError as error:
            raise ClusterError(f"cluster.storage: {error}") from error
