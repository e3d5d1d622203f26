"""How fast the choices of one request are opened, so that one with many of them, or with much to
tell a rank for each, holds up nobody: a few in one turn of the event loop, clients in turn, and
none as long as a rank has much to read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.request_pacer import RequestPacer

AT_ONCE = 8
"""Choices: some tenths of a millisecond."""
_POLL_S = 0.002
_WAIT_MAX_S = 1.0
"""If a rank still does not read then, it is for its link to judge it."""


class OpeningPace:
    """`is_congested`: whether a rank has not read much of what was sent to it."""

    def __init__(self, pacer: RequestPacer, is_congested: Callable[[], bool]) -> None:
        self._pacer = pacer
        self._is_congested = is_congested

    async def turn(self, client: str, is_first: bool) -> None:
        """Returns when the next few choices of this client may be opened. The first come with the
        turn in which their request begins."""
        if not is_first:
            await self.next_turn(client)
        if self._is_congested():
            await self._wait_for_room()

    async def next_turn(self, client: str) -> None:
        """Of the event loop, in this client's line."""
        await self._pacer.begin(client)

    async def _wait_for_room(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _WAIT_MAX_S
        while self._is_congested() and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
