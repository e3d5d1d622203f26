"""What names a session's request in logs, metrics and traces. Nothing is decided by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTag:
    """`request_id` is the client's own, or the gateway's. `endpoint` is the route that was asked.
    `traceparent` is W3C's, of the span that the gateway made for the request; "": not traced."""

    request_id: str = ""
    endpoint: str = ""
    traceparent: str = ""


NO_TAG = RequestTag()
