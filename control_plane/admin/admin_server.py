"""The admin API's listening sockets. A connection is for one request, so that strangers who connect
and say nothing are few, soon gone, and in nobody's way."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Handler

from control_plane.admin.admin_app import AdminApp
from shared.clock import SystemClock
from shared.connection_table import ConnectionLimits
from shared.http_listener import HttpListener
from shared.request_body import READ_BYTES

CONNECTIONS_MAX = 64
LIMITS = ConnectionLimits(
    connections_max=CONNECTIONS_MAX,
    per_address_max=CONNECTIONS_MAX,
    header_timeout_s=10.0,
    idle_timeout_s=10.0,
)
"""The idle time is for a client that takes its answer slowly: nothing else follows."""


@asynccontextmanager
async def serving(
    app: AdminApp,
    listeners: Iterable[socket.socket],
    tls: ssl.SSLContext | None = None,
    *,
    limits: ConnectionLimits = LIMITS,
) -> AsyncIterator[None]:
    """While the body runs. The sockets are closed at the end."""
    listener = HttpListener(limits, clock=SystemClock())
    runner = web.AppRunner(
        app.build(listener.track_request, _end_after_answer),
        access_log=None,
        logger=_silent_logger(),
        auto_decompress=False,  # `request_body` does it, within limits
        shutdown_timeout=1.0,
        read_bufsize=READ_BYTES,
        lingering_time=0.0,  # a body that is not read, for want of a token, is not taken either
    )
    await runner.setup()
    sweeps = asyncio.create_task(listener.run())
    try:
        await listener.start(runner, listeners, tls, backlog=CONNECTIONS_MAX)
        yield
    finally:
        sweeps.cancel()
        listener.stop()
        await runner.cleanup()


@web.middleware
async def _end_after_answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    response.force_close()
    return response


def _silent_logger() -> logging.Logger:
    """What the HTTP library says of malformed requests quotes them, and a token may be in them."""
    logger = logging.Logger("admin.http", level=logging.CRITICAL)
    logger.addHandler(logging.NullHandler())
    return logger
