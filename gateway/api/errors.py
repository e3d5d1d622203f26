"""The one place where an error or a session's failure becomes an HTTP status and OpenAI's error
shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from aiohttp import web

from gateway.api.responses import error_body, with_request_id
from gateway.session_state import Failure, FailureKind, SessionFailed
from shared.errors import (
    Overloaded,
    RequestError,
    StarfishError,
    Unauthenticated,
    Unavailable,
)

_STATUS_BY_CODE = {
    "forbidden": 403,
    "model_not_found": 404,
    "response_not_found": 404,
    "item_not_found": 404,
    "request_too_large": 413,
    "request_timeout": 408,
    "unsupported_content_encoding": 415,
    "expectation_failed": 417,
}
_STATUS_BY_FAILURE = {
    FailureKind.NO_RANK: (503, "no_rank_available"),
    FailureKind.RANKS_LOST: (500, "ranks_lost"),
    FailureKind.REJECTED: (500, "rejected_by_rank"),
    FailureKind.SHUTDOWN: (503, "shutting_down"),
    FailureKind.STALLED: (503, "stalled"),
    FailureKind.DEADLINE: (504, "deadline_exceeded"),
}


_NO_EMBEDDINGS = ": this instance generates text and has no embeddings"
_NO_SOUND_OR_PICTURES = ": this instance reads and writes text only"
_BY_CONTROL_PLANE = ": the control plane's admin API serves it (docs/admin_api.md)"
_NOT_SERVED = {
    "embeddings": _NO_EMBEDDINGS,
    "pooling": _NO_EMBEDDINGS,
    "rerank": ": this instance generates text and ranks no documents",
    "score": ": this instance generates text and ranks no documents",
    "classify": ": this instance generates text and classifies none",
    "audio": _NO_SOUND_OR_PICTURES,
    "images": _NO_SOUND_OR_PICTURES,
    "moderations": ": this instance judges no texts",
    "files": ": requests carry their input themselves",
    **dict.fromkeys(
        (
            *("scale_elastic_ep", "is_scaling_elastic_ep", "fault_tolerance"),
            *("status", "scale", "drain", "undrain", "replace", "restart"),
            *("pause", "resume", "rebalance"),
        ),
        _BY_CONTROL_PLANE,
    ),
    "batches": ": send requests at once; a gateway runs many side by side",
}
"""A word of a path that other servers have → why it is missing here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpError:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def of_request(self, request_id: str) -> HttpError:
        return replace(self, body=with_request_id(self.body, request_id))

    def response(self) -> web.Response:
        return web.Response(
            status=self.status,
            body=self.body,
            content_type="application/json",
            headers=self.headers,
        )


def http_error(error: StarfishError) -> HttpError:
    match error:
        case RequestError():
            status = _STATUS_BY_CODE.get(error.code or "", 400)
            body = error_body(
                str(error), kind="invalid_request_error", param=error.param, code=error.code
            )
            return HttpError(status=status, body=body)
        case Unauthenticated():
            body = error_body(str(error), kind="invalid_request_error", code="invalid_api_key")
            headers = {"WWW-Authenticate": 'Bearer realm="starfish"'}
            return HttpError(status=401, body=body, headers=headers)
        case Overloaded():
            body = error_body(str(error), kind="rate_limit_error", code=error.code)
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return HttpError(status=429, body=body, headers=headers)
        case Unavailable():
            body = error_body(str(error), kind="server_error", code="unavailable")
            return HttpError(status=503, body=body, headers={"Retry-After": "1"})
        case SessionFailed(failure=Failure(kind=FailureKind.INVALID, message=message)):
            body = error_body(message, kind="invalid_request_error", code="invalid_grammar")
            return HttpError(status=400, body=body)
        case SessionFailed(failure=Failure(kind=FailureKind.OVERLOADED, message=message)):
            return http_error(Overloaded(message, retry_after_s=1))
        case SessionFailed(failure=failure):
            status, code = _STATUS_BY_FAILURE[failure.kind]
            body = error_body(failure.message, kind="server_error", code=code)
            headers = {"Retry-After": "1"} if status == 503 else {}
            return HttpError(status=status, body=body, headers=headers)
    body = error_body(str(error), kind="server_error", code="internal_error")
    return HttpError(status=500, body=body)


def plain_http_error(status: int, reason: str, *, code: str | None = None) -> HttpError:
    """For requests that the HTTP library itself rejects."""
    return HttpError(
        status=status, body=error_body(reason, kind="invalid_request_error", code=code)
    )


def not_allowed(method: str, path: str, allowed: Sequence[str]) -> HttpError:
    """405, with the methods that the path has."""
    error = plain_http_error(
        405, f"{method} {path} is not served; use {' or '.join(allowed)}", code="method_not_allowed"
    )
    return replace(error, headers={"Allow": ", ".join(allowed)})


def not_found(method: str, path: str, served: Sequence[str]) -> HttpError:
    """404, which says what there is, and of what other servers have at this path why it is not."""
    words = path.strip("/").split("/")
    absent = next((why for name, why in _NOT_SERVED.items() if name in words), "")
    return plain_http_error(
        404, f"{method} {path} is not served{absent}. Served: {', '.join(served)}", code="not_found"
    )
