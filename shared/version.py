"""The version of this Starfish."""

from __future__ import annotations

from functools import cache
from importlib import metadata

_UNKNOWN = "0+unknown"


@cache
def starfish_version() -> str:
    """Of the installed package; a source tree that is not installed has none. Read once: a process
    stays what it is if another version is installed meanwhile, and every answer names it."""
    try:
        return metadata.version("starfish-moe")
    except metadata.PackageNotFoundError:
        return _UNKNOWN
