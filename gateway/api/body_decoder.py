"""Reads and decodes the bodies of requests: short ones at once, long and coded ones in a thread,
one after the other and with pauses, so that who sends many of them does not take the event loop
from others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple

from aiohttp import web

from gateway.api.bodies import B, decode_body, ignored_fields
from gateway.api.json_bounds import UNCOUNTED_BYTES_MAX, check_num_values
from gateway.api.resumption import body_digest
from gateway.api_keys import ApiKey
from gateway.body_room import BodyRoom
from gateway.preparation import Preparation
from shared.request_body import RawBody, decompress, read_body

RESTS = 3.0
"""Between two long bodies so many times the time that the first has taken. Decoding holds Python's
lock, in a thread too: long bodies get a quarter of the interpreter at most."""


class DecodedBody(NamedTuple, Generic[B]):
    """`ignored` as `ignored_fields` has it. `digest` names the body if it asks for a stream."""

    body: B
    num_bytes: int  # uncoded
    ignored: list[str]
    digest: bytes


class BodyDecoder:
    """`bytes_max` is the limit on an uncoded body."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._turns = Preparation(running_max=1, rests=RESTS)
        self._room = BodyRoom()

    async def read(
        self,
        request: web.Request,
        key: ApiKey,
        cls: type[B],
        *,
        turn: Callable[[], Awaitable[None]],
    ) -> DecodedBody[B]:
        """Of whom it counts is `key`. `turn` as in `read_body`. Raises RequestError, and Overloaded
        if too many long ones are on their way, or wait."""
        length = request.content_length
        num_bytes = self._bytes_max if length is None and request.can_read_body else length or 0
        with self._room.taken(key, min(num_bytes, self._bytes_max)):
            raw = await read_body(request, self._bytes_max, turn=turn)
            return await self.decode(key, raw, cls)

    async def decode(self, key: ApiKey, raw: RawBody, cls: type[B]) -> DecodedBody[B]:
        """Raises RequestError, and Overloaded if too many long ones wait."""
        if raw.coding is None and len(raw.data) <= UNCOUNTED_BYTES_MAX:
            return _decode(raw.data, cls)
        num_bytes = len(raw.data) if raw.coding is None else self._bytes_max
        async with self._turns.turn(key, cost=float(num_bytes), timeout_s=None):
            return await asyncio.to_thread(_decode_long, raw, cls, self._bytes_max)


def _decode_long(raw: RawBody, cls: type[B], bytes_max: int) -> DecodedBody[B]:
    data = raw.data
    if raw.coding is not None:
        data = decompress(data, raw.coding, bytes_max)
    check_num_values(data)
    return _decode(data, cls)


def _decode(data: bytes, cls: type[B]) -> DecodedBody[B]:
    body = decode_body(data, cls)
    digest = body_digest(data) if getattr(body, "stream", False) else b""
    return DecodedBody(body, len(data), ignored_fields(data, cls), digest)
