"""Decodes the bodies of requests: short ones at once, long ones in a thread, one after the other
and with pauses, so that whoever sends many of them does not take the event loop from others."""

from __future__ import annotations

import asyncio
from typing import Generic, NamedTuple

from gateway.api.bodies import B, decode_body, ignored_fields
from gateway.api.json_bounds import UNCOUNTED_BYTES_MAX, check_num_values
from gateway.api.resumption import body_digest
from gateway.api_keys import ApiKey
from gateway.preparation import Preparation

RESTS = 3.0
"""Between two long bodies so many times the time that the first has taken. Decoding holds Python's
lock, in a thread too: long bodies get a quarter of the interpreter at most."""


class DecodedBody(NamedTuple, Generic[B]):
    """`ignored` as `ignored_fields` has it. `digest` names the body if it asks for a stream."""

    body: B
    ignored: list[str]
    digest: bytes


class BodyDecoder:
    def __init__(self) -> None:
        self._turns = Preparation(running_max=1, rests=RESTS)

    async def decode(self, key: ApiKey, raw: bytes, cls: type[B]) -> DecodedBody[B]:
        """Raises RequestError, and Overloaded if too many long ones wait."""
        if len(raw) <= UNCOUNTED_BYTES_MAX:
            return _decode(raw, cls)
        async with self._turns.turn(key, cost=float(len(raw)), timeout_s=None):
            return await asyncio.to_thread(_decode, raw, cls)


def _decode(raw: bytes, cls: type[B]) -> DecodedBody[B]:
    check_num_values(raw)
    body = decode_body(raw, cls)
    digest = body_digest(raw) if getattr(body, "stream", False) else b""
    return DecodedBody(body, ignored_fields(raw, cls), digest)
