"""How fast the choices of one request are opened, so that one with many of them, or with much to
tell a rank for each, holds up nobody: a few in one turn of the event loop, clients in turn, with
rests while others are served, and none as long as a rank has much to read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.client_pace import ClientPace
from gateway.request_pacer import RequestPacer

AT_ONCE = 8
"""Choices: some tenths of a millisecond."""
RESTS = 3.0
"""After a few choices so many times what they have taken, of the event loop, passes before the next
few of the same client. A rank takes about as long to read them."""
_COST_MAX_S = 0.02
"""What a few take at most: if the measured time is longer, others have been busy."""
_COST_FIRST_S = 0.001
"""Before any was measured."""
_COSTS_MAX = 256
_POLL_S = 0.002
_WAIT_MAX_S = 1.0
"""If a rank still does not read then, it is for its link to judge it."""


class OpeningPace:
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
        self._pace = ClientPace()
        self._costs_s: dict[str, float] = {}  # of the last few choices of a client

    async def turn(self, client: str, is_first: bool) -> None:
        """Returns when the next few choices of this client may be opened, which the caller does at
        once. The first come with the turn in which their request begins."""
        if not is_first:
            await self._rest(client)
            await self.next_turn(client)
        if self._is_congested():
            await self._wait_for_room()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._measure, client, loop.time())

    async def next_turn(self, client: str) -> None:
        """Of the event loop, in this client's line."""
        await self._pacer.begin(client)

    async def _rest(self, client: str) -> None:
        if not self._serves_others(client):
            return
        given_s = self._costs_s.get(client, _COST_FIRST_S) * (1 + RESTS)
        wait_s = self._pace.reserve(client, given_s, asyncio.get_running_loop().time())
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def _measure(self, client: str, began: float) -> None:
        """Called when the loop goes on after the choices."""
        if len(self._costs_s) >= _COSTS_MAX and client not in self._costs_s:
            self._costs_s.clear()  # they are learned again with the next few
        elapsed_s = asyncio.get_running_loop().time() - began
        self._costs_s[client] = min(elapsed_s, _COST_MAX_S)

    async def _wait_for_room(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _WAIT_MAX_S
        while self._is_congested() and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
