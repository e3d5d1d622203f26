"""A control plane's Prometheus metrics, and /health over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shared.errors import ConfigError

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Has its own registry, because tests run two control planes in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.epoch = Gauge("starfish_epoch", "epoch of the map", registry=self.registry)
        self.leader = Gauge(
            "starfish_control_plane_leader", "1 while this one may act", registry=self.registry
        )
        self.members = Gauge("starfish_members", "ranks in the map", registry=self.registry)
        self.suspected = Gauge(
            "starfish_suspected", "members under suspicion now", registry=self.registry
        )
        self.survivable = Gauge(
            "starfish_survivable_rank_failures",
            "rank failures that the last map without a death survives without a reload",
            registry=self.registry,
        )
        self.rank_load = Gauge(
            "starfish_rank_expert_load",
            "work of the rank's experts lately, over the mean of all ranks",
            ["rank"],
            registry=self.registry,
        )
        self.layer_imbalance = Gauge(
            "starfish_layer_imbalance",
            "the busiest rank's work over the mean, lately: of the median and of the worst layer",
            ["layer"],
            registry=self.registry,
        )
        self.expert_replicas = Gauge(
            "starfish_expert_replicas",
            "replicas of an expert: the fewest, the mean and the most",
            ["of"],
            registry=self.registry,
        )
        self.rebalances = Counter("starfish_rebalances", "rebalances begun", registry=self.registry)
        self.verdicts = Counter(
            "starfish_verdicts", "members declared dead", ["cause"], registry=self.registry
        )
        self.alarms = Counter("starfish_alarms", "alarms raised", ["kind"], registry=self.registry)
        self.verdict_s = Histogram(
            "starfish_verdict_seconds",
            "from the first signal on a member to its verdict",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.publish_s = Histogram(
            "starfish_publish_seconds",
            "from a decision to the committed map",
            buckets=_SECONDS,
            registry=self.registry,
        )


@asynccontextmanager
async def http_endpoint(
    metrics: Metrics, health: Callable[[], dict[str, object]], *, host: str, port: int
) -> AsyncIterator[int]:
    """Serves while the body runs, and yields the port. Raises ConfigError if the port is taken."""

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(metrics.registry),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def show_health(_: web.Request) -> web.Response:
        return web.json_response(health())

    app = web.Application()
    app.add_routes([web.get("/metrics", show_metrics), web.get("/health", show_health)])
    runner = web.AppRunner(app, access_log=None)
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
