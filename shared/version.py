"""The version of this Starfish. The package's metadata have it from here."""

VERSION = "0.2.0.dev0"

ANSWERS_VERSION = "0.1.0"
"""The release since which the same request gives the same answer to the bit. Streams can be resumed
among releases that have the same one."""


def starfish_version() -> str:
    return VERSION
