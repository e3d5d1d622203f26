"""Takes the rest of bodies that nobody reads, because their request was answered without: so that a
client that sends first and then listens gets its answer, and who sends many of them, to no path or
without a key, does not take the event loop from others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

LINGER_S = 10.0
"""Then the connection is closed."""
BYTES_PER_S = 64 << 20
"""Of all connections: taking so much costs some hundredths of a core."""
PIECE_S = 0.004
"""A piece counts for as many bytes as come in this time at least: one of small chunks has few, and
takes as long."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class UnreadBodies:
    """Its answer goes out before. The HTTP library must not linger by itself."""

    def __init__(self, bytes_per_s: float = BYTES_PER_S) -> None:
        self._bytes_per_s = bytes_per_s
        self._next_at = 0.0  # on the loop's clock: when the next piece may be taken

    @web.middleware
    async def take(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if not request.content.at_eof():
            try:
                await response.prepare(request)
                await response.write_eof()
                async with asyncio.timeout(LINGER_S):
                    await self._discard(request)
            except (ConnectionError, TimeoutError, web.RequestPayloadError):
                pass  # the HTTP library closes it
        return response

    async def _discard(self, request: web.Request) -> None:
        loop = asyncio.get_running_loop()
        while not request.content.at_eof():
            piece = await request.content.readany()
            cost_s = max(len(piece) / self._bytes_per_s, PIECE_S)
            self._next_at = max(self._next_at, loop.time()) + cost_s
            await asyncio.sleep(self._next_at - loop.time())
