"""The version of this Starfish."""

from __future__ import annotations

from importlib import metadata

_UNKNOWN = "0+unknown"


def starfish_version() -> str:
    """Of the installed package; a source tree that is not installed has none."""
    try:
        return metadata.version("starfish-moe")
    except metadata.PackageNotFoundError:
        return _UNKNOWN
