"""The one place where an error or a session's failure becomes an HTTP status and OpenAI's error
shape."""

from __future__ import annotations

from dataclasses import dataclass, field

from aiohttp import web

from gateway.api.responses import error_body
from gateway.stream_session import FailureKind, SessionFailed
from shared.errors import Overloaded, RequestError, StarfishError, Unavailable

_STATUS_BY_CODE = {"model_not_found": 404, "request_too_large": 413, "request_timeout": 408}
_STATUS_BY_FAILURE = {
    FailureKind.NO_RANK: (503, "no_rank_available"),
    FailureKind.RANKS_LOST: (500, "ranks_lost"),
    FailureKind.REJECTED: (500, "rejected_by_rank"),
    FailureKind.SHUTDOWN: (503, "shutting_down"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpError:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

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
        case Overloaded():
            body = error_body(str(error), kind="rate_limit_error", code="overloaded")
            headers = {"Retry-After": str(error.retry_after_s)}
            return HttpError(status=429, body=body, headers=headers)
        case Unavailable():
            body = error_body(str(error), kind="server_error", code="unavailable")
            return HttpError(status=503, body=body, headers={"Retry-After": "1"})
        case SessionFailed(failure=failure):
            status, code = _STATUS_BY_FAILURE[failure.kind]
            body = error_body(failure.message, kind="server_error", code=code)
            headers = {"Retry-After": "1"} if status == 503 else {}
            return HttpError(status=status, body=body, headers=headers)
    body = error_body(str(error), kind="server_error", code="internal_error")
    return HttpError(status=500, body=body)


def plain_http_error(status: int, reason: str) -> HttpError:
    """For requests that the HTTP library itself rejects: unknown paths, wrong methods."""
    return HttpError(
        status=status, body=error_body(reason, kind="invalid_request_error", code=None)
    )
