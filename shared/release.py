"""Which release a process is, and with which others it can serve.

A release speaks protocols `protocol_min` to `protocol`: of messages, of records in etcd, and of
what ranks write into each other's memory. Two releases serve together if these ranges overlap; then
they use what both know. The rules that make it so:

- An unknown field is ignored. A new field has a default, which means what the older release did.
- A message of an unknown kind is ignored. Who sends a new kind looks first at whether the other
  side's `protocol` has it.
- A change that fits neither rule takes the next number, and is not used towards a release that does
  not have it. Only when no supported release lacks it may `PROTOCOL_MIN` grow.
- An epoch's ranks compute the same bits: a change of the arithmetic raises `PROTOCOL_MIN`.

    protocol
    1   Starfish 0.1. Its processes do not say which release they are.
    2   A handshake's proof covers the frames as they were sent, so they may have new fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.version import starfish_version

PROTOCOL = 2
PROTOCOL_MIN = 1
_VERSION_BYTES_MAX = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """`version` is for people alone."""

    version: str
    protocol: int
    protocol_min: int

    def speaks_with(self, other: Release) -> bool:
        newest = min(self.protocol, other.protocol)
        return newest >= max(self.protocol_min, other.protocol_min)

    def __str__(self) -> str:
        version = self.version[:_VERSION_BYTES_MAX]
        if self.protocol == self.protocol_min:
            return f"Starfish {version} (protocol {self.protocol})"
        return f"Starfish {version} (protocols {self.protocol_min} to {self.protocol})"


FIRST_RELEASE = Release(version="0.1", protocol=1, protocol_min=1)
"""That of a process which does not say it."""


def own_release() -> Release:
    return Release(version=starfish_version(), protocol=PROTOCOL, protocol_min=PROTOCOL_MIN)


def refusal(own: str, other: str, release: Release) -> str:
    """Why our process and one of `release` cannot serve together, and what to do. `own` and `other`
    name them."""
    mine = own_release()
    older = own if mine.protocol < release.protocol else other
    return (
        f"{other} is {release}, and {own} is {mine}: they cannot serve together. Upgrade {older} "
        "through a release that speaks with both, or start another instance (docs/upgrade.md)"
    )
