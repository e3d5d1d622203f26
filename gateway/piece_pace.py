"""How fast the event loop does what comes in many pieces, so that one client with many of them
holds up nobody: choices are opened, and bodies in chunks read, a few in one turn of the loop,
clients in turn, with rests while others are served; no choices while a rank has much to read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum

from gateway.client_pace import ClientPace
from gateway.request_pacer import RequestPacer

AT_ONCE = 8
"""Choices with little to tell a rank: some tenths of a millisecond."""
RESTS = 3.0
"""After a piece so many times what it has taken of the event loop passes before the same client's
next one. Of choices, a rank takes about as long to read them."""
_IN_ADVANCE_S = 0.002
"""Of a client's rests: a timer is a millisecond late."""
_COST_MAX_S = 0.002
"""What a piece takes at most: if the measured time is longer, others have been busy."""
_COST_FIRST_S = 0.001
"""Before any was measured."""
_COSTS_MAX = 256
_POLL_S = 0.002
_WAIT_MAX_S = 1.0
"""If a rank still does not read then, it is for its link to judge it."""


class _Piece(Enum):
    CHOICES = "choices"
    CHUNKS = "chunks"


class PiecePace:
    """`is_congested`: whether a rank has not read much of what was sent to it. `serves_others`:
    whether anybody but this client has requests in flight."""

    def __init__(
        self,
        pacer: RequestPacer,
        is_congested: Callable[[], bool],
        serves_others: Callable[[str], bool],
    ) -> None:
        self._pacer = pacer
        self._is_congested = is_congested
        self._serves_others = serves_others
        self._pace = ClientPace(burst_s=_IN_ADVANCE_S)
        self._costs_s: dict[tuple[_Piece, str], float] = {}  # of the client's last one

    async def choices_turn(self, client: str, is_first: bool) -> None:
        """Returns when the next few choices of this client may be opened, which the caller does at
        once. The first come with the turn in which their request begins."""
        if not is_first:
            await self._next(_Piece.CHOICES, client)
        if self._is_congested():
            await self._wait_for_room()
        self._measure(_Piece.CHOICES, client)

    async def body_turn(self, client: str) -> None:
        """Returns when the next chunks of a body of this client may be read, which the caller does
        at once."""
        await self._next(_Piece.CHUNKS, client)
        self._measure(_Piece.CHUNKS, client)

    async def _next(self, piece: _Piece, client: str) -> None:
        """A turn of the event loop, in this client's line, after its rest."""
        if self._serves_others(client):
            given_s = self._costs_s.get((piece, client), _COST_FIRST_S) * (1 + RESTS)
            wait_s = self._pace.reserve(client, given_s, asyncio.get_running_loop().time())
            if wait_s > 0:
                await asyncio.sleep(wait_s)
        await self._pacer.begin(client)

    def _measure(self, piece: _Piece, client: str) -> None:
        """Until the loop goes on after it."""
        loop = asyncio.get_running_loop()
        loop.call_soon(self._learn, piece, client, loop.time())

    def _learn(self, piece: _Piece, client: str, began: float) -> None:
        if len(self._costs_s) >= _COSTS_MAX and (piece, client) not in self._costs_s:
            self._costs_s.clear()  # they are learned again with the next ones
        elapsed_s = asyncio.get_running_loop().time() - began
        self._costs_s[piece, client] = min(elapsed_s, _COST_MAX_S)

    async def _wait_for_room(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _WAIT_MAX_S
        while self._is_congested() and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
