"""What is known of a shard once it is done: its tar, the records of its images, and what was left out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.dataset import Shard
from pipelines.index import RECORD, Index


@dataclass(frozen=True, eq=False)
class Done:
    """A shard that is done. Without a good image it has no records, and no tar where one would have been written."""

    tar: str  # its name in dataset.json
    size: int  # bytes of the tar
    sha256: str
    records: Index  # [n] whose `shard` is filled in later
    left_out: tuple[tuple[str, str], ...] = ()  # name and reason of each image
    labels: tuple[str, ...] = ()  # adopted tars: what the records' labels stand for

    @property
    def shard(self) -> Shard:
        """Its entry in dataset.json."""
        return Shard(self.tar, len(self.records), self.size, self.sha256)

    def labelled(self, numbers: Mapping[str, int]) -> "Done":
        """The same with labels that are classes."""
        table = np.array([numbers[label] for label in self.labels], np.int32)
        records = self.records.copy()
        records["label"] = table[records["label"]] if len(records) else 0
        return replace(self, records=records, labels=())

    def encode(self) -> bytes:
        """A line of JSON, then the records."""
        records = self.records.astype(RECORD, copy=False).tobytes()
        about: dict[str, Any] = {"tar": self.tar, "size": self.size, "sha256": self.sha256}
        about |= {"left_out": self.left_out, "labels": self.labels}
        return json.dumps(about | {"records_sha256": hashlib.sha256(records).hexdigest()}).encode() + b"\n" + records

    @staticmethod
    def decode(data: bytes) -> "Done | None":
        """None for what a loss of power has torn: that shard is made again."""
        line, _, records = data.partition(b"\n")
        try:
            about = json.loads(line)
            if about.pop("records_sha256") != hashlib.sha256(records).hexdigest():
                return None
            left_out = tuple((name, reason) for name, reason in about.pop("left_out"))
            return Done(
                records=np.frombuffer(records, RECORD), left_out=left_out, labels=tuple(about.pop("labels")), **about
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
