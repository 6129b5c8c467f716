"""How long to try again: pauses that grow, until nothing has come for so long."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipelines.remote.failures import Denied, StoreError

T = TypeVar("T")
REQUEST_S = 60.0  # for one answer
FIRST_S, LONGEST_S = 0.2, 15.0  # pauses

HINTS: dict[type[StoreError], str] = {
    Denied: "; the environment of this process needs credentials that may read it (AWS_*, GOOGLE_*, AZURE_*)"
}


@dataclass(frozen=True)
class Patience:
    """wait_s: how long a request may go on failing; setting: what says so. Tests bring their own clock."""

    wait_s: float
    setting: str = ""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def told(self, error: StoreError) -> str:
        """A failure as the end of a sentence: where, why, and how long it was tried."""
        setting = f" ({self.setting})" if self.setting else ""
        return f"{error}" + (
            f", tried for {self.wait_s:.0f} s{setting}" if error.passes else HINTS.get(type(error), "")
        )

    def __call__(
        self,
        request: Callable[[], T],
        failed: Callable[[StoreError], None] = lambda _: None,
        gained: Callable[[], int] = lambda: 0,
    ) -> T:
        """What `request` returns. Tries again after failures that may pass; raises the last one when time is up.

        failed: hears of each failure that is tried again. gained: how far it has come; what comes on is not given up.
        """
        began, pause, had = self.clock(), FIRST_S, gained()
        while True:
            try:
                return request()
            except StoreError as error:
                if (now := gained()) > had:
                    began, pause, had = self.clock(), FIRST_S, now
                if not error.passes or self.clock() - began + pause > self.wait_s:
                    raise
                failed(error)
            self.sleep(pause)
            pause = min(2 * pause, LONGEST_S)
