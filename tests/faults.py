"""What can go wrong with a server, and when: rules for the servers of the tests."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What was asked for, and what was sent. path: below the server's URL. begin, end: of a range, else None."""

    method: str
    path: str
    begin: int | None = None
    end: int | None = None
    sent: int = 0  # bytes of the body so far; a client that has them finds them counted


@dataclass(frozen=True)
class Cut:
    """Hangs up after so many bytes of a body that has more; 0: without any answer."""

    after_bytes: int


@dataclass(frozen=True)
class Stall:
    """Sends nothing for so long, or until the server closes, in mid-body; after_bytes 0: not even the status."""

    seconds: float
    after_bytes: int = 0


@dataclass(frozen=True)
class Status:
    """Answers with an error."""

    code: int
    body: bytes = b"<html><body><h1>no</h1></body></html>"


@dataclass(frozen=True)
class Html:
    """200, and a page in place of the object: what a proxy or a login form does."""


@dataclass(frozen=True)
class Flip:
    """The lowest bit of the byte at `offset` of the object, in ranges too."""

    offset: int


@dataclass(frozen=True)
class NoRanges:
    """200 and everything, whatever range was asked for."""


@dataclass(frozen=True)
class Slow:
    """A thin line."""

    bytes_per_s: int


Fault = Cut | Stall | Status | Html | Flip | NoRanges | Slow
Rule = Callable[[Request, int], Fault | None]
ACCESS_DENIED = Status(403, b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>")
PAGE = b"<html><body>Please log in.</body></html>" * 200


def first(n: int, fault: Fault, path: str = "", method: str = "GET") -> Rule:
    """The first n requests by that method of that path; path '': of each path."""
    return lambda r, nth: fault if r.method == method and path in ("", r.path) and nth < n else None


def always(fault: Fault, path: str = "", method: str = "") -> Rule:
    """All requests of that path; '': any path, any method."""
    return lambda r, _: fault if method in ("", r.method) and path in ("", r.path) else None


def each(*rules: Rule) -> Rule:
    """The fault of the first rule that has one."""
    return lambda r, nth: next((fault for rule in rules if (fault := rule(r, nth))), None)
