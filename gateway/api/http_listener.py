"""The gateway's listening sockets: accepts connections of clients, refuses those that are too many,
and closes those that wait too long. What is too many and too long, `connection_table` decides."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import cast

import structlog
from aiohttp import web

from gateway.api.errors import http_error
from gateway.connection_table import ConnectionId, ConnectionLimits, ConnectionTable, Refusal
from gateway.metrics import GatewayMetrics
from shared.clock import Clock
from shared.errors import Overloaded, Unavailable
from shared.server_certificate import HANDSHAKE_TIMEOUT_S

log = structlog.get_logger()

BACKLOG = 1024
_SWEEP_S = 0.25
_FIRST_REQUEST_S = 1.0
_ANSWERED_POLL_S = 0.02
_REFUSALS = {
    Refusal.FULL: Unavailable("the gateway has as many connections as it takes; retry"),
    Refusal.ADDRESS_FULL: Overloaded(
        "this address has as many connections as one may have: reuse them", retry_after_s=1
    ),
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpListener:
    """Serves `runner`'s application, whose outermost middleware must be `track_request`."""

    def __init__(self, limits: ConnectionLimits, *, clock: Clock, metrics: GatewayMetrics) -> None:
        self._table = ConnectionTable(limits)
        self._clock = clock
        self._metrics = metrics
        self._servers: list[asyncio.Server] = []
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
    ) -> None:
        """Call it once `runner` is set up."""
        handlers = runner.server
        assert handlers is not None, "`runner.setup` comes first"
        make_inner = cast("Callable[[], asyncio.Protocol]", handlers)
        for listener in listeners:
            server = await asyncio.get_running_loop().create_server(
                lambda: cast("asyncio.Protocol", _Connection(self, make_inner)),
                sock=listener,
                backlog=BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if tls is not None else None,
            )
            self._servers.append(server)

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
                transport = self._transports[connection]
                unsent_bytes = transport.get_write_buffer_size()
                if not self._table.spare(connection, unsent_bytes, now):
                    self._metrics.on_connection_timeout()
                    transport.abort()

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

    def open(self, transport: asyncio.Transport) -> ConnectionId | None:
        """None: it is refused, with an answer, and closes."""
        peer = transport.get_extra_info("peername")
        found = self._table.open(str(peer[0]) if peer else "", self._clock.now())
        if isinstance(found, Refusal):
            self._metrics.on_connection_refused(found)
            transport.write(_refusal(found))
            transport.close()
            return None
        self._transports[found] = transport
        self._ids[transport] = found
        return found

    def on_bytes(self, connection: ConnectionId) -> None:
        self._table.on_bytes(connection, self._clock.now())

    def close(self, connection: ConnectionId) -> None:
        self._table.close(connection)
        del self._ids[self._transports.pop(connection)]


class _Connection:
    """An asyncio protocol in front of aiohttp's: it sees a connection begin, bytes come, and the
    end. aiohttp's own timer never ends a header that arrives in drops."""

    __slots__ = ("_connection", "_inner", "_listener", "_make_inner")

    def __init__(self, listener: HttpListener, make_inner: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener
        self._make_inner = make_inner
        self._inner: asyncio.Protocol | None = None  # None: refused
        self._connection: ConnectionId | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._connection = self._listener.open(transport)
        if self._connection is not None:
            self._inner = self._make_inner()
            self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None and self._connection is not None:
            self._listener.on_bytes(self._connection)
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        if self._inner is not None and self._connection is not None:
            self._listener.close(self._connection)
            self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()


def quiet_http_logger() -> logging.Logger:
    """For what the HTTP library says of requests that it cannot read: a line each, and no traceback
    for what a stranger sends. What the client sent is not in it: that may have been its key."""
    logger = logging.Logger("gateway.http", level=logging.WARNING)
    logger.addFilter(_log_line)
    return logger


def _log_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    log.warning("malformed_request", detail=record.getMessage(), error=_without_quotation(error))
    return False


def _without_quotation(error: BaseException | None) -> str:
    """The library says what is wrong, ":\\n", and then quotes what it has read. Of other messages
    it is not known where they quote."""
    kind = type(error).__name__
    said, separator, _ = str(getattr(error, "message", "")).partition(":\n")
    return f"{kind}: {said}"[:200] if separator else kind


def _refusal(refusal: Refusal) -> bytes:
    """A whole answer: no request is read for it."""
    error = http_error(_REFUSALS[refusal])
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(error.body)),
        "Connection": "close",
        **error.headers,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + error.body
