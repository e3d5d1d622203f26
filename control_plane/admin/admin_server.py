"""The admin API's listening sockets. A connection is for one request, so that strangers who connect
and say nothing are few, and soon gone."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import cast

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from control_plane.admin.admin_app import AdminApp
from shared.request_body import READ_BYTES
from shared.server_certificate import HANDSHAKE_TIMEOUT_S

log = structlog.get_logger()

CONNECTIONS_MAX = 64
HEADER_TIMEOUT_S = 10.0


@asynccontextmanager
async def serving(
    app: AdminApp, listeners: Iterable[socket.socket], tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """While the body runs. The sockets are closed at the end."""
    connections = _Connections()
    built = app.build(connections.on_request)
    runner = web.AppRunner(
        built,
        access_log=None,
        logger=_silent_logger(),
        auto_decompress=False,  # `request_body` does it, within limits
        shutdown_timeout=1.0,
        read_bufsize=READ_BYTES,
        lingering_time=0.0,  # a body that is not read, for want of a token, is not taken either
    )
    await runner.setup()
    servers: list[asyncio.Server] = []
    try:
        for listener in listeners:
            servers.append(await connections.serve(runner, listener, tls))
        yield
    finally:
        for server in servers:
            server.close()
        await runner.cleanup()


class _Connections:
    def __init__(self) -> None:
        self._timers: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}
        """Of open connections on which no request has come yet."""

    async def serve(
        self, runner: web.AppRunner, listener: socket.socket, tls: ssl.SSLContext | None
    ) -> asyncio.Server:
        http_server = runner.server
        assert http_server is not None, "`runner.setup` comes first"
        loop = asyncio.get_running_loop()

        def accept() -> asyncio.Protocol:
            if len(http_server.connections) >= CONNECTIONS_MAX:
                return _Refused()
            return _Connection(self, http_server())

        return await loop.create_server(
            accept,
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if tls is not None else None,
        )

    @web.middleware
    async def on_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.transport is not None:
            self.stop_timer(request.transport)
        response = await handler(request)
        response.force_close()
        return response

    def start_timer(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        self._timers[transport] = loop.call_later(HEADER_TIMEOUT_S, transport.abort)

    def stop_timer(self, transport: asyncio.BaseTransport) -> None:
        timer = self._timers.pop(transport, None)
        if timer is not None:
            timer.cancel()


class _Connection(asyncio.Protocol):
    """In front of aiohttp's protocol: of a connection that has ended nothing may stay, also not for
    as long as its timer would have run."""

    def __init__(self, connections: _Connections, inner: web.RequestHandler) -> None:
        self._connections = connections
        self._inner = inner
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.start_timer(cast("asyncio.Transport", transport))
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        self._inner.eof_received()
        return None

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._connections.stop_timer(self._transport)
        self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _silent_logger() -> logging.Logger:
    """What the HTTP library says of malformed requests quotes them, and a token may be in them."""
    logger = logging.Logger("admin.http", level=logging.CRITICAL)
    logger.addHandler(logging.NullHandler())
    return logger
