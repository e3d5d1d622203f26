"""What clients see of the gateway's listening sockets beyond their requests: how many may connect,
and what those are told that are too many."""

from __future__ import annotations

import logging
from http import HTTPStatus

import structlog

from gateway.api.errors import http_error
from gateway.metrics import GatewayMetrics
from shared.clock import Clock
from shared.connection_table import ConnectionLimits, Refusal
from shared.errors import Overloaded, Unavailable
from shared.http_listener import HttpListener

log = structlog.get_logger()

BACKLOG = 1024
_REFUSALS = {
    Refusal.FULL: Unavailable("the gateway has as many connections as it takes; retry"),
    Refusal.ADDRESS_FULL: Overloaded(
        "this address has as many connections as one may have: reuse them", retry_after_s=1
    ),
}


def client_listener(
    limits: ConnectionLimits, *, clock: Clock, metrics: GatewayMetrics
) -> HttpListener:
    return HttpListener(limits, clock=clock, observer=metrics, refusals=_refusal)


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
