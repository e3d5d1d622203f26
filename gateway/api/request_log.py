"""Gives each request an id, which its log lines, its answer and its errors name, and writes the
access log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from gateway.api.request_context import REQUEST_ID_HEADER, RequestContext, context_of, open_context
from shared.api_key import without_keys
from shared.clock import Clock

log = structlog.get_logger()

CLIENT_GONE = 499
"""What the access log says where a client has not waited for its answer."""
POLLED_PATHS = ("/health", "/metrics", "/ping")
"""Asked for every few seconds, by nobody in particular: in the access log only if they fail."""
_PATH_CHARACTERS_MAX = 200

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestLog:
    def __init__(self, clock: Clock, *, access_log: bool) -> None:
        self._clock = clock
        self._access_log = access_log

    @web.middleware
    async def log_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        context = open_context(request, self._clock.now())
        status = CLIENT_GONE
        with structlog.contextvars.bound_contextvars(request_id=context.id):
            try:
                response = await handler(request)
                status = response.status
                return response
            finally:
                if self._access_log and not (status < 400 and is_polled(request.path)):
                    self._write(request, context, status)

    def _write(self, request: web.Request, context: RequestContext, status: int) -> None:
        log.info(
            "request",
            method=request.method,
            path=without_keys(request.path)[:_PATH_CHARACTERS_MAX],
            status=status,
            duration_ms=round((self._clock.now() - context.began_at) * 1000, 1),
            client=request.remote or "",
            key=context.key.name,
            prompt_tokens=context.num_prompt_tokens,
            generated_tokens=context.num_generated,
            **({} if context.span is None else {"trace_id": context.span.trace_id}),
        )


async def name_request(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: whoever has an answer can say which request it was."""
    context = context_of(request)
    if context is not None:
        response.headers[REQUEST_ID_HEADER] = context.id


def is_polled(path: str) -> bool:
    return any(path == polled or path.startswith(polled + "/") for polled in POLLED_PATHS)
