"""One connection to an HTTP port, in front of the protocol that reads its requests. A guard, who
counts connections, is told when it begins, when bytes come, and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from shared.connection_table import ConnectionId


class Guard(Protocol):
    def enter(self, transport: asyncio.Transport) -> ConnectionId | None:
        """None: it is refused, and has been closed."""
        ...

    def on_secured(self, connection: ConnectionId, transport: asyncio.Transport) -> None:
        """It had entered before its handshake. Requests come over this transport."""
        ...

    def on_bytes(self, connection: ConnectionId) -> None: ...

    def leave(self, connection: ConnectionId) -> None: ...


class GuardedConnection(asyncio.Protocol):
    """`entered`: the connection, if its guard knows it already. Of one that has ended nothing
    stays."""

    def __init__(
        self,
        guard: Guard,
        make_inner: Callable[[], asyncio.Protocol],
        entered: ConnectionId | None = None,
    ) -> None:
        self._guard = guard
        self._make_inner = make_inner
        self._inner: asyncio.Protocol | None = None  # None: not begun, or refused
        self._connection = entered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast("asyncio.Transport", transport)
        if self._connection is not None:
            self._guard.on_secured(self._connection, made)
        else:
            self._connection = self._guard.enter(made)
        if self._connection is not None:
            self._inner = self._make_inner()
            self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None and self._connection is not None:
            self._guard.on_bytes(self._connection)
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        if self._inner is not None and self._connection is not None:
            self._guard.leave(self._connection)
            self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()
