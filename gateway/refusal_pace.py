"""How fast one client is told that its requests are refused. One that asks again at once, whatever
it is told, would otherwise have them read and refused as fast as the event loop can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.client_pace import ClientPace

INTERVAL_S = 0.01
"""Between two refusals of a client: to read and refuse a request takes some tenths of a
millisecond."""
BURST = 16
"""So many are not held back."""
WAIT_MAX_S = 1.0
"""What `Retry-After` says at least."""


class RefusalPace:
    """`serves_others`: whether anybody but this client has requests in flight. A client that is
    alone is told at once."""

    def __init__(self, serves_others: Callable[[str], bool]) -> None:
        self._serves_others = serves_others
        self._pace = ClientPace(burst_s=BURST * INTERVAL_S)

    async def turn(self, client: str) -> None:
        """Returns when this client may be told of one more."""
        if not self._serves_others(client):
            return
        wait_s = self._pace.reserve(client, INTERVAL_S, asyncio.get_running_loop().time())
        if wait_s > 0:
            await asyncio.sleep(min(wait_s, WAIT_MAX_S))
