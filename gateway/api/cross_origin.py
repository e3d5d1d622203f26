"""Cross-origin requests of browsers (CORS): which origins may call, and what they are told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from gateway.api.rate_headers import RATES

_ANY = "*"
_PREFLIGHT_S = 600
_EXPOSED = ", ".join(
    [
        *("X-Request-Id", "Retry-After", "X-Starfish-Rank", "X-Starfish-Ignored-Fields"),
        *(f"X-RateLimit-{part}-{of}" for part in ("Limit", "Remaining", "Reset") for of in RATES),
    ]
)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class CrossOrigin:
    """Without origins no answer has a CORS header, so browsers let no other site's pages read one.
    `origins` are exact (`https://chat.example.com`), or "*" for all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)

    @web.middleware
    async def answer_preflight(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """A browser's question before a request, which has no key and no body."""
        wanted = request.headers.get("Access-Control-Request-Method")
        if not self._origins or request.method != "OPTIONS" or wanted is None:
            return await handler(request)
        headers = {
            "Access-Control-Allow-Methods": "GET, POST, DELETE, HEAD, OPTIONS",
            "Access-Control-Allow-Headers": request.headers.get(
                "Access-Control-Request-Headers", "Authorization, Content-Type"
            ),
            "Access-Control-Max-Age": str(_PREFLIGHT_S),
        }
        return web.Response(status=204, headers=headers)

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """A signal of the application: called before the headers of any answer are sent."""
        origin = request.headers.get("Origin")
        if not self._origins or origin is None:
            return
        response.headers.add("Vary", "Origin")
        if _ANY in self._origins:
            response.headers["Access-Control-Allow-Origin"] = _ANY
        elif origin in self._origins:
            response.headers["Access-Control-Allow-Origin"] = origin
        else:
            return
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
