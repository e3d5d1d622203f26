"""`/metrics` of a service over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from shared.clock import SystemClock
from shared.connection_table import ConnectionLimits
from shared.http_listener import HttpListener
from shared.listener import listen_on
from shared.request_body import READ_BYTES

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CONNECTIONS_MAX = 64
_LIMITS = ConnectionLimits(
    connections_max=_CONNECTIONS_MAX,
    per_address_max=_CONNECTIONS_MAX,
    header_timeout_s=10.0,
    idle_timeout_s=90.0,  # longer than the usual pause between two scrapes
)

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
    routes: Iterable[web.AbstractRouteDef], *, host: str, port: int, flags: str
) -> AsyncIterator[int]:
    """Serves while the body runs, and yields the port. Who connects and does not ask takes no
    descriptors that this process needs for its work. Raises ConfigError, which names the `flags`
    that choose another address, if this one is taken."""
    listener = HttpListener(_LIMITS, clock=SystemClock())
    app = web.Application(middlewares=[listener.track_request])
    app.add_routes(list(routes))
    # Nobody reads a body here: it is not taken either.
    runner = web.AppRunner(app, access_log=None, read_bufsize=READ_BYTES, lingering_time=0.0)
    opened = listen_on(host, port, flags=flags)
    await runner.setup()
    sweeps = asyncio.create_task(listener.run())
    try:
        await listener.start(runner, [opened], None, backlog=_CONNECTIONS_MAX)
        yield int(opened.getsockname()[1])
    finally:
        sweeps.cancel()
        listener.stop()
        await runner.cleanup()
