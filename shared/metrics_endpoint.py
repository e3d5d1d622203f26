"""`/metrics` of a service over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from shared.errors import ConfigError
from shared.request_body import READ_BYTES

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


_OPEN_METRICS = "application/openmetrics-text"


def metrics_format(accept: str) -> str:
    """One of the two forms that metrics have, by the Accept header: what else this may say, and
    whoever sends it, makes neither more forms nor an error."""
    return f"{_OPEN_METRICS}; version=1.0.0" if _OPEN_METRICS in accept else ""


def render_metrics(registry: CollectorRegistry, form: str) -> tuple[bytes, str]:
    """(the metrics, their content type): OpenMetrics, or Prometheus' text format. `form` as
    `metrics_format` has it."""
    encoder, content_type = choose_encoder(form)
    return encoder(registry), content_type


def metrics_handler(registry: CollectorRegistry, update: Callable[[], Awaitable[None]]) -> Handler:
    """`update` is awaited before each answer: it brings up to date what is not counted as it
    happens."""

    async def show_metrics(request: web.Request) -> web.StreamResponse:
        await update()
        form = metrics_format(request.headers.get("Accept", ""))
        body, content_type = render_metrics(registry, form)
        return web.Response(body=body, headers={"Content-Type": content_type})

    return show_metrics


@asynccontextmanager
async def serve_routes(
    routes: Iterable[web.AbstractRouteDef], *, host: str, port: int
) -> AsyncIterator[int]:
    """Serves while the body runs, and yields the port. Raises ConfigError if the port is taken."""
    app = web.Application()
    app.add_routes(list(routes))
    # Nobody reads a body here: it is not taken either.
    runner = web.AppRunner(app, access_log=None, read_bufsize=READ_BYTES, lingering_time=0.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
