"""How many values a JSON text may have. Decoding holds up the event loop, and with it everybody's
tokens, for a time that goes by values and not by bytes; so they are counted before, in a thread."""

from __future__ import annotations

import asyncio

from shared.errors import RequestError

UNCOUNTED_BYTES_MAX = 32 << 10
"""A text this short is decoded in a few milliseconds, whatever it has."""
OBJECTS_MAX = MEMBERS_MAX = 1 << 14
STRINGS_MAX = 1 << 16
VALUES_MAX = 1 << 19
"""Numbers mostly: the token ids of prompts. Decoding one takes a hundredth of what a member
takes."""


async def check_num_values(raw: bytes) -> None:
    """Raises RequestError. `raw` need not be JSON."""
    if len(raw) > UNCOUNTED_BYTES_MAX:
        await asyncio.to_thread(_check, raw)


def _check(raw: bytes) -> None:
    """In few calls over all bytes, none of which makes more than `STRINGS_MAX` objects."""
    if b"\\" in raw:
        raw = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    _limit("strings", raw.count(b'"') // 2, STRINGS_MAX)
    structure = b"".join(raw.split(b'"')[::2])
    _limit("members of objects", structure.count(b":"), MEMBERS_MAX)
    _limit("objects and lists", structure.count(b"{") + structure.count(b"["), OBJECTS_MAX)
    _limit("values", structure.count(b","), VALUES_MAX)


def _limit(what: str, number: int, most: int) -> None:
    if number > most:
        raise RequestError(
            f"the body has {number} {what}, but may have {most}: send smaller requests",
            code="too_many_values",
        )
