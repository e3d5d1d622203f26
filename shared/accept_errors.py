"""What an event loop's own servers say when there are no descriptors left."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

log = structlog.get_logger()

_ACCEPT = "socket.accept() out of system resource"
_EVERY_S = 1.0


def log_failed_accepts_once(loop: asyncio.AbstractEventLoop) -> None:
    """asyncio tries again after a second, but before that as often as its backlog is long, each
    time with a traceback: 256 a second, until the log has filled the disk. From now on one line a
    second says so."""
    said_at = -_EVERY_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said_at
        if context.get("message") != _ACCEPT:
            loop.default_exception_handler(context)
        elif loop.time() >= said_at + _EVERY_S:
            said_at = loop.time()
            log.error("accept_failed", detail=str(context.get("exception")), again_in_s=_EVERY_S)

    loop.set_exception_handler(handle)
