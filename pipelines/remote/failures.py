"""How a request to a store fails, and whether trying again may help."""


class StoreError(Exception):
    """A request that failed; `passes` says whether trying again may help: with a server, unless it says otherwise."""

    passes = False


class NotThere(StoreError):
    """There is no such object or bucket."""


class Denied(StoreError):
    """The credentials are missing, wrong, or not enough."""


class NoRanges(StoreError):
    """The server gives whole objects only (`python -m http.server` is one)."""
