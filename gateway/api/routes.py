"""The paths that are served, in a form that tells of the others: each with and without a slash at
its end; and `Expect`, to which a client's body comes only when it is asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec
from aiohttp import web

from gateway.api.errors import (
    HttpError,
    not_allowed,
    not_found,
    plain_http_error,
)
from shared.errors import RequestError
from shared.openapi import JSON, Endpoint
from shared.request_body import body_too_large

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


_ASKED = web.RequestKey("asked_for_body", bool)


class Routes:
    def __init__(self, router: web.UrlDispatcher) -> None:
        self._router = router
        self.endpoints: list[Endpoint] = []

    def get(
        self,
        path: str,
        handler: Handler,
        summary: str,
        *,
        content_type: str = JSON,
        reports: bool = False,
    ) -> None:
        """HEAD is answered as well. `reports`: the answer has the same form with status 503."""
        self.endpoints.append(
            Endpoint(
                method="GET",
                path=path,
                summary=summary,
                content_type=content_type,
                reports=reports,
            )
        )
        for spelt in (path, path + "/"):
            self._router.add_get(spelt, handler, expect_handler=_go_on)

    def delete(self, path: str, handler: Handler, summary: str) -> None:
        self.endpoints.append(Endpoint(method="DELETE", path=path, summary=summary))
        for spelt in (path, path + "/"):
            self._router.add_delete(spelt, handler, expect_handler=_go_on)

    def post(
        self,
        path: str,
        handler: Handler,
        summary: str,
        *,
        body: type[msgspec.Struct] | None = None,
        streams: bool = False,
        reports: bool = False,
    ) -> None:
        """`body` decodes the request's; `streams`: the answer may be a stream of events; `reports`
        as in `get`."""
        self.endpoints.append(
            Endpoint(
                method="POST",
                path=path,
                summary=summary,
                body=body,
                streams=streams,
                reports=reports,
            )
        )
        for spelt in (path, path + "/"):
            self._router.add_post(spelt, handler, expect_handler=_go_on)

    def error_for(self, request: web.Request, error: web.HTTPException) -> HttpError:
        """For a request that matches no route, or is refused by the HTTP library."""
        if isinstance(error, web.HTTPMethodNotAllowed):
            return not_allowed(request.method, request.path, sorted(error.allowed_methods))
        if error.status == HTTPStatus.NOT_FOUND:
            served = [f"{each.method} {each.plain_path}" for each in self.endpoints]
            return not_found(request.method, request.path, served)
        return plain_http_error(error.status, error.reason)


async def _go_on(_: web.Request) -> None:
    """The HTTP library calls it before the middlewares, by which every answer goes."""


def ask_for_body(request: web.Request, bytes_max: int) -> None:
    """Lets a client that waits for it send its body. Raises RequestError: 413 for one that is too
    large, 417 for another `Expect` than `100-continue`."""
    expected = request.headers.get("Expect")
    if expected is None:
        return
    if expected.lower() != "100-continue":
        raise RequestError(
            "the only Expect that is served is 100-continue",
            param="Expect",
            code="expectation_failed",
        )
    if (request.content_length or 0) > bytes_max:
        raise body_too_large(bytes_max)
    request[_ASKED] = True
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def awaits_body(request: web.Request) -> bool:
    """Whether a client may yet send a body that nobody has asked for."""
    return "Expect" in request.headers and not request.get(_ASKED, False)


def endpoint_of(request: web.Request) -> str:
    """The route's path as metrics name it; "unknown" for what is not served."""
    resource = request.match_info.route.resource
    if resource is None:
        return "unknown"
    return resource.canonical.rstrip("/") or "/"
