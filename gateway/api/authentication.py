"""Who asks: finds the API key of a request. Where no keys are configured, everybody may ask."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from aiohttp import web

from gateway.api.request_context import require_context
from gateway.api_keys import ANYBODY, ApiKey, KeySet
from gateway.metrics import GatewayMetrics
from gateway.request_pacer import RequestPacer
from shared.connection_table import client_of
from shared.errors import RequestError, Unauthenticated

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
"""Load balancers and orchestrators ask for these, and cannot have a key."""
METRICS_PATH = "/metrics"
_METHODS = "DELETE, GET, HEAD, OPTIONS, POST"
_HINT = "Send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`."

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Authenticator:
    """`keys` gives the present ones: they may change at any time. A request goes on with the key
    that it came with. Requests begin as `pacer` lets them, also those that are refused."""

    def __init__(
        self,
        keys: Callable[[], KeySet],
        metrics: GatewayMetrics,
        pacer: RequestPacer,
        *,
        metrics_need_key: bool,
    ) -> None:
        self._keys = keys
        self._metrics = metrics
        self._pacer = pacer
        self._metrics_need_key = metrics_need_key

    @web.middleware
    async def authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Before a route is looked for, so that strangers do not learn which there are. A
        browser's preflight (OPTIONS) never has a key, so it gets one answer for every path."""
        context, key = require_context(request), self._sent_key(request)
        # No key's name begins with a space.
        context.line = f" {client_of(request.remote or '')}" if key is None else key.name
        await self._pacer.begin(context.line)
        if request.method == "OPTIONS":
            return web.Response(status=204, headers={"Allow": _METHODS})
        if self._needs_key(request):
            context.key = self._checked(request, key)
        return await handler(request)

    def _sent_key(self, request: web.Request) -> ApiKey | None:
        """The first of those sent that is right."""
        keys = self._keys()
        found = (keys.find(text) for text in _sent_keys(request))
        return next((key for key in found if key is not None), None)

    def _needs_key(self, request: web.Request) -> bool:
        path = request.path.rstrip("/")
        if path in OPEN_PATHS:
            return False
        return path != METRICS_PATH or self._metrics_need_key

    def _checked(self, request: web.Request, key: ApiKey | None) -> ApiKey:
        """Raises Unauthenticated, and RequestError if the key may not have this page."""
        if not len(self._keys()):
            return ANYBODY
        if key is None:
            self._metrics.on_unauthenticated()
            sent = any(_sent_keys(request))
            problem = "Incorrect API key provided." if sent else "You didn't provide an API key."
            raise Unauthenticated(f"{problem} {_HINT}")
        if request.path.rstrip("/") == METRICS_PATH and not key.reads_metrics:
            raise RequestError("this key may not read metrics", code="forbidden")
        return key


def _sent_keys(request: web.Request) -> Iterator[str]:
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        yield credentials.strip()
    if other := request.headers.get("x-api-key", "").strip():
        yield other
