"""What names a session's request in logs, metrics and traces. Nothing is decided by it."""

from __future__ import annotations

from dataclasses import dataclass

from shared.tracing import TraceSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTag:
    """`request_id` is the client's own, or the gateway's. `endpoint` is the route that was asked.
    `span` is the request's; None: it is not traced."""

    request_id: str = ""
    endpoint: str = ""
    span: TraceSpan | None = None

    @property
    def traceparent(self) -> str:
        """For ranks, whose spans become children of this one; "": not traced."""
        return "" if self.span is None else self.span.traceparent


NO_TAG = RequestTag()
