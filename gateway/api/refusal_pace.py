"""How fast one client is told that its requests are refused. One that asks again at once, whatever
it is told, would otherwise have them read and refused as fast as the event loop can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from gateway.api.request_context import require_context
from gateway.api.routes import Handler
from gateway.client_pace import ClientPace

INTERVAL_S = 0.02
"""Between two refusals of a client: to read and refuse a request takes some tenths of a
millisecond, or more if its body is long."""
BURST = 16
"""So many are not held back."""
WAIT_MAX_S = 5.0
"""So long a client waits that has some 250 refused requests under way."""


class RefusalPace:
    """`serves_others`: whether anybody but this client has requests in flight. A client that is
    alone is told at once."""

    def __init__(self, serves_others: Callable[[str], bool]) -> None:
        self._serves_others = serves_others
        self._pace = ClientPace(burst_s=BURST * INTERVAL_S)

    @web.middleware
    async def hold_back(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Around what turns errors into answers: what an error holds, such as a long body, is gone
        when its answer waits."""
        response = await handler(request)
        if 400 <= response.status < 500:
            await self.turn(require_context(request).line)
        return response

    async def turn(self, client: str) -> None:
        """Returns when this client may be told of one more."""
        if not self._serves_others(client):
            return
        wait_s = self._pace.reserve(client, INTERVAL_S, asyncio.get_running_loop().time())
        if wait_s > 0:
            await asyncio.sleep(min(wait_s, WAIT_MAX_S))
