"""URLs of objects: text, nothing else."""

import re
from urllib.parse import unquote

URL = re.compile(r"(?P<root>(?P<scheme>[a-z0-9+]+)://(?P<host>[^/?#]*))(?P<path>/[^?#]*)?")
SCHEMES = ("s3", "gs", "az", "http", "https")


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path of this machine."""
    return "://" in place


def split_url(url: str) -> tuple[str, str]:
    """(bucket or server, name of the object in it), for every scheme: 's3://bucket/a/b' -> ('s3://bucket', 'a/b').

    Raises ValueError for what is no URL of a known scheme, for one with a query (signed URLs expire in mid-run), and
    for one with a password (it would stand in logs).
    """
    found = URL.fullmatch(url)
    if not found or found["scheme"] not in SCHEMES or not found["host"] or "@" in found["host"]:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        shown = re.sub(r"//[^/]*@", "//***@", url)
        raise ValueError(f"'{shown}' is not a URL of {known} without query and password")
    name = (found["path"] or "/").lstrip("/")
    return found["root"], unquote(name) if found["scheme"].startswith("http") else name
