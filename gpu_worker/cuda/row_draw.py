"""How one wanted row becomes a token on the device."""

from __future__ import annotations

from typing import NamedTuple

BANNED_MAX = 4


class RowDraw(NamedTuple):
    """`uniform` is derived from (seed, position). At most BANNED_MAX ids are banned."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    uniform: float = 0.0
    banned: tuple[int, ...] = ()
