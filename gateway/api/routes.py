"""The paths that are served, in a form that tells of the others: each with and without a slash at
its end, and with a 413 for a body that is too large before it is asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec
from aiohttp import web

from gateway.api.errors import (
    HttpError,
    http_error,
    not_allowed,
    not_found,
    plain_http_error,
)
from shared.openapi import JSON, Endpoint
from shared.request_body import body_too_large

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """`body_bytes_max` limits what `Expect: 100-continue` announces."""

    def __init__(self, router: web.UrlDispatcher, *, body_bytes_max: int) -> None:
        self._router = router
        self._body_bytes_max = body_bytes_max
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
            self._router.add_get(spelt, handler)

    def delete(self, path: str, handler: Handler, summary: str) -> None:
        self.endpoints.append(Endpoint(method="DELETE", path=path, summary=summary))
        self._router.add_delete(path, handler)

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
            self._router.add_post(spelt, handler, expect_handler=self._on_expect)

    def error_for(self, request: web.Request, error: web.HTTPException) -> HttpError:
        """For a request that matches no route, or is refused by the HTTP library."""
        if isinstance(error, web.HTTPMethodNotAllowed):
            return not_allowed(request.method, request.path, sorted(error.allowed_methods))
        if error.status == HTTPStatus.NOT_FOUND:
            served = [f"{each.method} {each.plain_path}" for each in self.endpoints]
            return not_found(request.method, request.path, served)
        return plain_http_error(error.status, error.reason)

    async def _on_expect(self, request: web.Request) -> web.Response | None:
        """Called before the middlewares. None: the client may send its body."""
        if request.headers.get("Expect", "").lower() != "100-continue":
            return plain_http_error(
                417, "the only Expect that is served is 100-continue"
            ).response()
        if (request.content_length or 0) > self._body_bytes_max:
            response = http_error(body_too_large(self._body_bytes_max)).response()
            response.force_close()  # the body may be on its way
            return response
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None


def endpoint_of(request: web.Request) -> str:
    """The route's path as metrics name it; "unknown" for what is not served."""
    resource = request.match_info.route.resource
    if resource is None:
        return "unknown"
    return resource.canonical.rstrip("/") or "/"
