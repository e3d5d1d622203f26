"""The admin API's listening sockets. A connection is for one request, so that strangers who connect
and say nothing are few, and soon gone."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

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
        self._silent: set[web.RequestHandler] = set()  # no request has come on it yet

    async def serve(
        self, runner: web.AppRunner, listener: socket.socket, tls: ssl.SSLContext | None
    ) -> asyncio.Server:
        http_server = runner.server
        assert http_server is not None, "`runner.setup` comes first"
        loop = asyncio.get_running_loop()

        def accept() -> asyncio.Protocol:
            if len(http_server.connections) >= CONNECTIONS_MAX:
                return _Refused()
            handler = http_server()
            self._silent.add(handler)
            loop.call_later(HEADER_TIMEOUT_S, self._close_if_silent, handler)
            return handler

        return await loop.create_server(
            accept,
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if tls is not None else None,
        )

    @web.middleware
    async def on_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._silent.discard(request.protocol)
        response = await handler(request)
        response.force_close()
        return response

    def _close_if_silent(self, handler: web.RequestHandler) -> None:
        if handler in self._silent:
            self._silent.discard(handler)
            if handler.transport is not None:
                handler.transport.abort()


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _silent_logger() -> logging.Logger:
    """What the HTTP library says of malformed requests quotes them, and a token may be in them."""
    logger = logging.Logger("admin.http", level=logging.CRITICAL)
    logger.addHandler(logging.NullHandler())
    return logger
