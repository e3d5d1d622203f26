"""Lets requests begin one after the other, clients in turn, so that a burst of one client's does
not hold up the tokens of others: between two of them the event loop serves what else has come."""

from __future__ import annotations

import asyncio
from collections import deque


class RequestPacer:
    """One request begins in each turn of the event loop. An idle loop turns at once, so nobody
    waits for nothing. Of a client that has sent many, the oldest is next; among clients, the one
    whose last turn was longest ago."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # the first is next
        self._is_taken = False  # the present turn of the loop

    async def begin(self, client: str) -> None:
        if not self._is_taken:
            self._take()
            return
        turn = asyncio.get_running_loop().create_future()
        self._lines.setdefault(client, deque()).append(turn)
        await turn

    def _take(self) -> None:
        self._is_taken = True
        # Twice: the first callback runs before the loop looks for what has come.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._grant_next)

    def _grant_next(self) -> None:
        self._is_taken = False
        while self._lines:
            client, line = next(iter(self._lines.items()))
            turn = line.popleft()
            del self._lines[client]
            if line:
                self._lines[client] = line
            if not turn.done():  # its client is still there
                turn.set_result(None)
                self._take()
                return
