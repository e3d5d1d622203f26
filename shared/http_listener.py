"""An HTTP port: accepts connections within limits, and closes those that wait too long. Which those
are, `connection_table` decides."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Protocol, cast

from aiohttp import web

from shared.clock import Clock
from shared.connection_table import ConnectionId, ConnectionLimits, ConnectionTable, Refusal
from shared.guarded_connection import GuardedConnection
from shared.server_certificate import HANDSHAKE_TIMEOUT_S
from shared.socket_acceptor import SocketAcceptor

_SWEEP_S = 0.25
_FIRST_REQUEST_S = 1.0
_ANSWERED_POLL_S = 0.02

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ConnectionObserver(Protocol):
    """Is told what becomes of connections beyond their requests."""

    def on_connection_refused(self, refusal: Refusal) -> None: ...

    def on_connection_displaced(self) -> None:
        """It had waited longest for its client, and made room for another."""
        ...

    def on_connection_timeout(self) -> None: ...


class HttpListener:
    """Serves `runner`'s application, whose outermost middleware must be `track_request`.
    With TLS a connection counts from before its handshake. `refusals` are the whole HTTP answers to
    connections that are refused; without TLS, for nobody could read them before a handshake."""

    def __init__(
        self,
        limits: ConnectionLimits,
        *,
        clock: Clock,
        observer: ConnectionObserver | None = None,
        refusals: Callable[[Refusal], bytes] | None = None,
    ) -> None:
        self._table = ConnectionTable(limits)
        self._clock = clock
        self._observer = observer
        self._refusals = refusals
        self._servers: list[asyncio.Server | SocketAcceptor] = []
        self._handshakes: dict[ConnectionId, asyncio.Task[object]] = {}
        self._transports: dict[ConnectionId, asyncio.Transport] = {}
        self._ids: dict[asyncio.BaseTransport, ConnectionId] = {}

    @property
    def num_connections(self) -> int:
        return len(self._table)

    async def start(
        self,
        runner: web.AppRunner,
        listeners: Iterable[socket.socket],
        tls: ssl.SSLContext | None,
        *,
        backlog: int,
    ) -> None:
        """Call it once `runner` is set up."""
        handlers = runner.server
        assert handlers is not None, "`runner.setup` comes first"
        make_inner = cast("Callable[[], asyncio.Protocol]", handlers)
        for listener in listeners:
            self._servers.append(
                await asyncio.get_running_loop().create_server(
                    lambda: GuardedConnection(self, make_inner), sock=listener, backlog=backlog
                )
                if tls is None
                else SocketAcceptor(
                    listener, partial(self._shake_hands, make_inner, tls), backlog=backlog
                )
            )

    def stop_sharing(self) -> None:
        """Accepts no more at the first of the listeners. Open connections go on. Those that wait in
        the queue of its socket are for whoever else has it."""
        self._servers[0].close()

    def stop(self) -> None:
        """Accepts no more. Open connections go on."""
        for server in self._servers:
            server.close()

    async def wait_until_answered(self) -> None:
        """Until no connection has a request, or is new enough to be about to send its first."""
        while self._table.num_to_answer(self._clock.now(), silent_s=_FIRST_REQUEST_S):  # noqa: ASYNC110
            await asyncio.sleep(_ANSWERED_POLL_S)

    async def run(self) -> None:
        """Closes connections whose time is over, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self._clock.now()
            for connection in self._table.expired(now):
                transport = self._transports.get(connection)
                unsent_bytes = 0 if transport is None else transport.get_write_buffer_size()
                if not self._table.spare(connection, unsent_bytes, now):
                    if self._observer is not None:
                        self._observer.on_connection_timeout()
                    self._end(connection)

    @web.middleware
    async def track_request(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        transport = request.transport
        connection = None if transport is None else self._ids.get(transport)
        if connection is None:  # closed before its handler began
            return await handler(request)
        self._table.on_request(connection)
        try:
            return await handler(request)
        finally:
            self._table.on_answer(connection, self._clock.now())

    def enter(self, transport: asyncio.Transport) -> ConnectionId | None:
        """For connections without TLS: see `guarded_connection.Guard`."""
        peer = transport.get_extra_info("peername")
        found = self._open(str(peer[0]) if peer else "")
        if isinstance(found, Refusal):
            if self._refusals is not None:
                transport.write(self._refusals(found))
            transport.close()
            return None
        self._transports[found] = transport
        self._ids[transport] = found
        return found

    def on_secured(self, connection: ConnectionId, transport: asyncio.Transport) -> None:
        if self._handshakes.pop(connection, None) is None:  # it had to go meanwhile
            transport.abort()
            return
        self._transports[connection] = transport
        self._ids[transport] = connection

    def on_bytes(self, connection: ConnectionId) -> None:
        if connection in self._transports:
            self._table.on_bytes(connection, self._clock.now())

    def leave(self, connection: ConnectionId) -> None:
        """Nothing happens if it has left already."""
        transport = self._transports.pop(connection, None)
        if transport is not None:
            del self._ids[transport]
        if transport is not None or self._handshakes.pop(connection, None) is not None:
            self._table.close(connection)

    def _open(self, address: str) -> ConnectionId | Refusal:
        displaced = self._table.makes_room_for(address)
        if displaced is not None:
            if self._observer is not None:
                self._observer.on_connection_displaced()
            self._end(displaced)
        found = self._table.open(address, self._clock.now())
        if isinstance(found, Refusal) and self._observer is not None:
            self._observer.on_connection_refused(found)
        return found

    def _end(self, connection: ConnectionId) -> None:
        if (handshake := self._handshakes.get(connection)) is not None:
            handshake.cancel()
        else:
            self._transports[connection].abort()
        self.leave(connection)

    def _shake_hands(
        self,
        make_inner: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext,
        accepted: socket.socket,
        address: str,
    ) -> None:
        connection = self._open(address)
        if isinstance(connection, Refusal):
            accepted.close()
            return
        loop = asyncio.get_running_loop()
        handshake = loop.create_task(
            loop.connect_accepted_socket(
                partial(GuardedConnection, self, make_inner, connection),
                accepted,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )
        )
        self._handshakes[connection] = handshake
        handshake.add_done_callback(partial(self._on_handshake, connection, accepted))

    def _on_handshake(
        self, connection: ConnectionId, accepted: socket.socket, handshake: asyncio.Task[object]
    ) -> None:
        has_failed = handshake.cancelled() or handshake.exception() is not None
        if has_failed or connection in self._handshakes:
            accepted.close()
            self.leave(connection)
