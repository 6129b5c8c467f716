"""How long to try again: pauses that grow, until nothing has come for so long."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipelines.remote.store import StoreError

T = TypeVar("T")
FIRST_S, LONGEST_S = 0.2, 15.0  # pauses


@dataclass(frozen=True)
class Patience:
    """wait_s: how long a request may go on failing. Tests bring their own clock."""

    wait_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __call__(self, request: Callable[[], T], failed: Callable[[StoreError], None] = lambda _: None) -> T:
        """What `request` returns. Tries again after failures that may pass; raises the last one when time is up.

        failed: hears of each failure that is tried again.
        """
        began, pause = self.clock(), FIRST_S
        while True:
            try:
                return request()
            except StoreError as error:
                if not error.passes or self.clock() - began + pause > self.wait_s:
                    raise
                failed(error)
            self.sleep(pause)
            pause = min(2 * pause, LONGEST_S)
