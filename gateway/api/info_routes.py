"""What the gateway tells of itself and of its model: no route here generates anything."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from gateway.api.api_info import GATEWAY_API
from gateway.api.responses import model_entry, model_list
from gateway.api.routes import Routes
from gateway.api.shared_rendering import SharedRendering
from gateway.health import Health
from gateway.metrics import GatewayMetrics
from gateway.served_model import ServedModel
from gateway.session_driver import SessionDriver
from shared.errors import RequestError
from shared.metrics_endpoint import metrics_format
from shared.openapi import Endpoint, openapi_document, openapi_page
from shared.version import starfish_version

_READINESS = {
    "/health": "whether a request that is sent now would run",
    "/health/ready": "the same",
    "/ping": "as /health",
}


class InfoRoutes:
    """`require_model` returns the served model, or raises Unavailable."""

    def __init__(
        self,
        *,
        driver: SessionDriver,
        health: Health,
        metrics: GatewayMetrics,
        require_model: Callable[[], Awaitable[ServedModel]],
    ) -> None:
        self._driver = driver
        self._health = health
        self._rendering = SharedRendering(metrics.render)
        self._require_model = require_model
        self._endpoints: Sequence[Endpoint] = ()
        self._document: dict[str, Any] | None = None  # of the endpoints, which do not change

    def add_to(self, routes: Routes) -> None:
        routes.get("/v1/models", self._list_models, "the served model and its aliases")
        routes.get("/v1/models/{name:.+}", self._show_model, "one of them")
        routes.get("/get_model_info", self._describe_model, "the model, as SGLang describes it")
        for path, summary in _READINESS.items():
            routes.get(path, self._show_ready, summary, reports=True)
        routes.post("/ping", self._show_ready, "as /health", reports=True)
        routes.get("/health/live", self._show_live, "whether the gateway answers at all")
        routes.get("/version", self._show_version, "the version of Starfish")
        routes.get("/load", self._show_load, "the sessions in flight")
        routes.get(
            "/metrics", self._show_metrics, "metrics for Prometheus", content_type="text/plain"
        )
        routes.get("/openapi.json", self._show_openapi, "this description")
        routes.get(
            "/docs", self._show_docs, "this description, for people", content_type="text/html"
        )
        self._endpoints = routes.endpoints  # of all of them, when a request comes

    async def _list_models(self, request: web.Request) -> web.Response:
        served = await self._require_model()
        body = model_list(served.names, served.created, self._context(served))
        return web.Response(body=body, content_type="application/json")

    async def _show_model(self, request: web.Request) -> web.Response:
        name, served = request.match_info["name"].rstrip("/"), await self._require_model()
        if name not in served.names:
            raise model_not_found(name, served)
        return web.json_response(model_entry(name, served.created, self._context(served)))

    async def _describe_model(self, request: web.Request) -> web.Response:
        """SGLang's description."""
        served = await self._require_model()
        return web.json_response(
            {
                "model_path": served.spec.model_path,
                "tokenizer_path": served.spec.model_path,
                "is_generation": True,
                "served_model_name": served.name,
                "max_context_length": self._context(served),
                "vocab_size": served.spec.vocab_size,
            }
        )

    def _context(self, served: ServedModel) -> int:
        return served.limits(self._driver.view).context_tokens_max

    async def _show_ready(self, request: web.Request) -> web.Response:
        report = self._health.report()
        return web.json_response(report, status=503 if report["reasons"] else 200)

    async def _show_live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def _show_version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": starfish_version()})

    async def _show_load(self, request: web.Request) -> web.Response:
        """`server_load`: this gateway's sessions in flight, as vLLM counts its requests."""
        return web.json_response(
            {
                "server_load": self._driver.num_sessions,
                "waiting": self._driver.num_waiting,
                "live_ranks": len(self._driver.live_ranks()),
            }
        )

    async def _show_openapi(self, request: web.Request) -> web.Response:
        return web.json_response(self._openapi())

    async def _show_docs(self, request: web.Request) -> web.Response:
        return web.Response(text=openapi_page(self._openapi()), content_type="text/html")

    def _openapi(self) -> dict[str, Any]:
        if self._document is None:
            self._document = openapi_document(GATEWAY_API, self._endpoints)
        return self._document

    async def _show_metrics(self, request: web.Request) -> web.Response:
        form = metrics_format(request.headers.get("Accept", ""))
        body, content_type = await self._rendering.page(form)
        return web.Response(body=body, headers={"Content-Type": content_type})


def model_not_found(name: str, served: ServedModel) -> RequestError:
    return RequestError(
        f"the model {name!r:.200} does not exist here; served: {', '.join(served.names)}",
        param="model",
        code="model_not_found",
    )
