"""The version of this Starfish."""

from __future__ import annotations

from functools import cache
from importlib import metadata

_UNKNOWN = "0+unknown"


@cache
def starfish_version() -> str:
    """Of the installed package; a source tree that is not installed has none. It is read from files
    once: each answer of a gateway tells of it."""
    try:
        return metadata.version("starfish-moe")
    except metadata.PackageNotFoundError:
        return _UNKNOWN
