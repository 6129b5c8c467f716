"""What a person should know of streaming, without a line for each request."""

import time
from collections.abc import Callable

SAY_S = 15.0  # between lines about one thing

Say = Callable[[str], None]


def nothing(_: str) -> None:
    """Tells nobody."""


class News:
    """Says the same thing once in a while."""

    def __init__(self, say: Say) -> None:
        self._say, self._said = say, dict[str, float]()

    def __call__(self, text: str, about: str = "") -> None:
        """about: what the text is about, where its words change."""
        now = time.monotonic()
        if now - self._said.get(about or text, -SAY_S) >= SAY_S:
            self._said[about or text] = now
            self._say(text)
