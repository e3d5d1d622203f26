"""What an agent serves over HTTP. For service managers and orchestrators: `/health/live` if it
answers at all, `/health` and `/health/ready` if all of its ranks serve. For Prometheus:
`/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from node_agent.metrics import AgentMetrics
from node_agent.node_health import node_report
from node_agent.rank_supervisor import RankSupervisor
from node_agent.serving_view import ServingView
from shared.changes import changes
from shared.keys import Keys
from shared.metrics_endpoint import metrics_handler, serve_routes
from shared.store import Store
from shared.types import Member

_FLAGS = "--metrics-port or --metrics-host"


@asynccontextmanager
async def serve_http(
    supervisor: RankSupervisor,
    metrics: AgentMetrics,
    store: Store,
    keys: Keys,
    *,
    host: str,
    port: int,
) -> AsyncIterator[int]:
    """Serves while the body runs, and yields the port. Raises ConfigError if it is taken."""
    health = _NodeHealth(supervisor, keys)
    routes = [
        web.get("/health", health.show_ready),
        web.get("/health/ready", health.show_ready),
        web.get("/health/live", health.show_live),
        web.get("/metrics", metrics_handler(metrics.registry, metrics.update)),
    ]
    async with (
        serve_routes(routes, host=host, port=port, flags=_FLAGS) as bound,
        asyncio.TaskGroup() as tasks,
    ):
        followers = [
            tasks.create_task(health.follow(store, key)) for key in (keys.map, keys.desired)
        ]
        yield bound
        for follower in followers:
            follower.cancel()


class _NodeHealth:
    def __init__(self, supervisor: RankSupervisor, keys: Keys) -> None:
        self._supervisor = supervisor
        self._view = ServingView(keys=keys)

    async def follow(self, store: Store, key: str) -> None:
        """Follows the key in etcd, until it is cancelled."""
        async for seen in changes(store, key):
            self._view.apply(seen)

    async def show_ready(self, _: web.Request) -> web.Response:
        alive = [each.member for each in self._supervisor.alive()]
        members = [Member(rank=r, incarnation=i) for r, i in self._view.members.items()]
        drains = [drain.rank for drain in self._view.desired.drains]
        report = node_report(self._supervisor.ranks, alive, members or None, drains)
        return web.json_response(report, status=503 if report["reasons"] else 200)

    async def show_live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "live"})
