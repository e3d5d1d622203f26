"""One span for each request that asks for something: the client's trace goes on in it, and ranks
add the spans of their attempts. Only in the chain of handlers if traces are on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from gateway.api.request_context import RequestContext, require_context
from gateway.api.request_log import CLIENT_GONE, is_polled
from gateway.api.routes import endpoint_of
from shared.tracing import Tracer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
TRACEPARENT_HEADER = "traceparent"


class RequestTraces:
    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @web.middleware
    async def trace_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Inside of `RequestLog.log_request`."""
        if is_polled(request.path):
            return await handler(request)
        context, endpoint = require_context(request), endpoint_of(request)
        context.span = self._tracer.start(
            f"{request.method} {endpoint}",
            {
                "http.request.method": request.method,
                "http.route": endpoint,
                "starfish.request_id": context.id,
            },
            parent=request.headers.get(TRACEPARENT_HEADER, ""),
            at=context.began_at,
        )
        status = CLIENT_GONE
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            _end(context, status)


def _end(context: RequestContext, status: int) -> None:
    span = context.span
    assert span is not None
    span.describe(
        {
            "http.response.status_code": status,
            "gen_ai.usage.input_tokens": context.num_prompt_tokens,
            "gen_ai.usage.output_tokens": context.num_generated,
            "starfish.api_key": context.key.name,
        }
    )
    span.end(error=f"status {status}" if status >= 500 else None)
