"""How many values a JSON text may have. Decoding holds up the event loop, and with it everybody's
tokens, for a time that goes by values and not by bytes; so they are counted before."""

from __future__ import annotations

from shared.errors import RequestError

UNCOUNTED_BYTES_MAX = 32 << 10
"""A text this short is decoded in a few milliseconds, whatever it has."""
OBJECTS_MAX = MEMBERS_MAX = 1 << 14
STRINGS_MAX = 1 << 16
VALUES_MAX = 1 << 19
"""Numbers mostly: the token ids of prompts. Decoding one takes a hundredth of what a member
takes."""


_SLICE_BYTES = 32 << 10
"""Counted at a time: no call holds the interpreter's lock for longer than this takes."""


def check_num_values(raw: bytes) -> None:
    """Raises RequestError. `raw` need not be JSON."""
    if len(raw) <= UNCOUNTED_BYTES_MAX:
        return
    num_quotes = num_members = num_objects = num_values = begin = 0
    while begin < len(raw):
        text = _without_half_escape(raw[begin : begin + _SLICE_BYTES])
        begin += len(text)
        if b"\\" in text:
            text = text.replace(rb"\\", b"").replace(rb"\"", b"")
        pieces = text.split(b'"')
        structure = b"".join(pieces[num_quotes % 2 :: 2])
        num_quotes += len(pieces) - 1
        num_members += structure.count(b":")
        num_objects += structure.count(b"{") + structure.count(b"[")
        num_values += structure.count(b",")
        _limit("strings", num_quotes // 2, STRINGS_MAX)
        _limit("members of objects", num_members, MEMBERS_MAX)
        _limit("objects and lists", num_objects, OBJECTS_MAX)
        _limit("values", num_values, VALUES_MAX)


def _without_half_escape(text: bytes) -> bytes:
    """Without a backslash at its end whose character comes in the next slice. `text` begins with
    no such character."""
    num_backslashes = len(text) - len(text.rstrip(b"\\"))
    return text[:-1] if num_backslashes % 2 and len(text) > 1 else text


def _limit(what: str, number: int, most: int) -> None:
    if number > most:
        raise RequestError(
            f"the body has {number} {what} or more, but may have {most}: send smaller requests",
            code="too_many_values",
        )
