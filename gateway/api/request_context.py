"""What is known of one HTTP request on its way through the gateway: its id, whose it is, and what
it has cost. Each part fills in what it learns; the access log and the answer's headers read it."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from aiohttp import web

from gateway.admission import Ticket
from gateway.api_keys import ANYBODY, ApiKey
from gateway.tenant_account import TenantAccount
from shared.tracing import TraceSpan
from shared.types import REQUEST_ID_PATTERN

REQUEST_ID_HEADER = "X-Request-Id"
_ECHOED = re.compile(REQUEST_ID_PATTERN)


@dataclass(slots=True, kw_only=True)
class RequestContext:
    id: str
    began_at: float
    key: ApiKey = ANYBODY
    line: str = ""  # in which it waits, if it must: of its key, or of its address without one
    account: TenantAccount | None = None
    ticket: Ticket | None = None
    body_bytes: int = 0
    body_digest: bytes = b""  # of a body that asks for a stream
    num_prompt_tokens: int = 0
    num_generated: int = 0
    span: TraceSpan | None = None  # if requests are traced


_CONTEXT = web.RequestKey("context", RequestContext)


def open_context(request: web.Request, now: float) -> RequestContext:
    context = RequestContext(id=_request_id(request), began_at=now)
    request[_CONTEXT] = context
    return context


def context_of(request: web.BaseRequest) -> RequestContext | None:
    """None before `open_context`: the HTTP library answers some broken requests by itself."""
    return request.get(_CONTEXT)


def require_context(request: web.Request) -> RequestContext:
    context = context_of(request)
    assert context is not None, "`RequestLog.log_request` is the outermost middleware"
    return context


def _request_id(request: web.Request) -> str:
    """The client's own, if it is one that can stand in a log line."""
    sent = request.headers.get(REQUEST_ID_HEADER, "")
    return sent if _ECHOED.fullmatch(sent) else uuid.uuid4().hex
