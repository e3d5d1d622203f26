"""The one place where an error becomes an HTTP status and a body: `{"error": {"message", "type",
"code"}}`, as the gateway's."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from aiohttp import web

from shared.errors import (
    RequestError,
    StarfishError,
    StoreUnavailable,
    Unauthenticated,
    Unavailable,
)

_STATUS_BY_CODE = {
    "request_timeout": 408,
    "request_too_large": 413,
    "unsupported_content_encoding": 415,
}


class ChangeRefused(StarfishError):
    """What was asked for cannot be, or not now; nothing was changed."""

    definitely_not_done = True


class TookTooLong(StarfishError):
    """A change goes on, but whoever waits for it has waited long enough."""


def error_response(error: StarfishError) -> web.Response:
    match error:
        case RequestError():
            status = _STATUS_BY_CODE.get(error.code or "", 400)
            code = error.code or "invalid_request"
            return _response(status, str(error), kind="invalid_request_error", code=code)
        case Unauthenticated():
            response = _response(401, str(error), kind="invalid_request_error", code="no_token")
            response.headers["WWW-Authenticate"] = 'Bearer realm="starfish admin"'
            return response
        case TookTooLong():
            return _response(408, str(error), kind="timeout", code="timeout")
        case ChangeRefused():
            return _response(409, str(error), kind="refused", code="refused")
        case Unavailable() | StoreUnavailable():
            response = _response(503, str(error), kind="server_error", code="unavailable")
            response.headers["Retry-After"] = "1"
            return response
    return _response(500, str(error), kind="server_error", code="internal_error")


def http_error_response(error: web.HTTPException) -> web.Response:
    """For a request that the HTTP library rejects."""
    message = error.reason
    if error.status == HTTPStatus.NOT_FOUND:
        message = "there is nothing at this path; GET /openapi.json says what there is"
    response = _response(
        error.status, message, kind="invalid_request_error", code="invalid_request"
    )
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _response(status: int, message: str, *, kind: str, code: str) -> web.Response:
    body = {"error": {"message": message, "type": kind, "code": code}}
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )
