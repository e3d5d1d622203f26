"""An agent's health over HTTP, for service managers and orchestrators: `/health/live` if it answers
at all, `/health` and `/health/ready` if all of its ranks serve."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from node_agent.node_health import node_report
from shared.changes import changes
from shared.errors import ConfigError
from shared.keys import Keys
from shared.records import unpack_map
from shared.store import Store
from shared.types import Member, RankId


class NodeHealth:
    """`ranks` and `alive` tell what the agent's supervisor knows when they are called."""

    def __init__(
        self, ranks: Callable[[], tuple[RankId, ...]], alive: Callable[[], list[Member]]
    ) -> None:
        self._ranks = ranks
        self._alive = alive
        self._members: tuple[Member, ...] | None = None

    async def follow(self, store: Store, keys: Keys) -> None:
        """Follows the map in etcd, until it is cancelled."""
        async for seen in changes(store, keys.map):
            for event in seen.events:
                self._members = None if event.value is None else unpack_map(event.value).members

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[int]:
        """Serves while the body runs, and yields the port. Raises ConfigError if it is taken."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._show_ready),
                web.get("/health/ready", self._show_ready),
                web.get("/health/live", self._show_live),
            ]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    async def _show_ready(self, _: web.Request) -> web.Response:
        report = node_report(self._ranks(), self._alive(), self._members)
        return web.json_response(report, status=503 if report["reasons"] else 200)

    async def _show_live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "live"})
