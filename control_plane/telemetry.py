"""A control plane's Prometheus metrics, and /health over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from control_plane.judgements import AlarmKind
from control_plane.tolerance_gauges import ToleranceGauges
from shared.metrics_endpoint import metrics_handler, serve_routes
from shared.types import SuspicionReason

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
MAP_CAUSES = ("formed", "dead", "joined", "healing", "healed", "resync", "published again")
"""How the `cause` of a map begins."""


class Metrics:
    """Has its own registry, because tests run two control planes in one process. What only a leader
    knows is 0 on one that stands by: take the largest of all control planes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.epoch = self._gauge("epoch", "epoch of the map")
        self.leader = self._gauge("control_plane_leader", "1 while this one may act")
        self.term = self._gauge("term", "number of the newest leader term")
        self.members = self._gauge("members", "ranks in the map")
        self.ranks_wanted = self._gauge("ranks_wanted", "ranks that the instance should have")
        self.ranks_registered = self._gauge("ranks_registered", "ranks that hold a lease")
        self.synced = self._gauge("etcd_synced", "1 once this one has read etcd")
        self.suspected = self._gauge("suspected", "members under suspicion now")
        self.dead_members = self._gauge(
            "dead_members", "members of the map that are dead: until it is replaced, no step runs"
        )
        self.frozen = self._gauge(
            "map_frozen", "1 while only deaths may change the map, as after a mass expiry of leases"
        )
        self.tolerance = ToleranceGauges(self.registry)
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
        self.verdicts_cancelled = Counter(
            "starfish_verdicts_cancelled",
            "verdicts that were not written, because the process went on",
            registry=self.registry,
        )
        self.alarms = Counter("starfish_alarms", "alarms raised", ["kind"], registry=self.registry)
        self.etcd_alarm = Gauge(
            "starfish_etcd_alarm",
            "1 while etcd takes no writes: its space is used up, or its members differ",
            ["kind"],
            registry=self.registry,
        )
        self.etcd_size = Gauge(
            "starfish_etcd_size_bytes",
            "database of the etcd member that answered last",
            registry=self.registry,
        )
        self.standstills = Counter(
            "starfish_standstills", "times that no step moved", registry=self.registry
        )
        self.maps = Counter("starfish_maps", "maps published", ["cause"], registry=self.registry)
        self.failed_writes = Counter(
            "starfish_failed_writes", "writes that etcd refused or lost", registry=self.registry
        )
        self.recovery_s = Histogram(
            "starfish_recovery_seconds",
            "after a death; verdict: from the first signal on, publish: from the verdict to the "
            "committed map",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.publish_s = Histogram(
            "starfish_publish_seconds",
            "from a decision to the committed map",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._begin_series()

    def count_map(self, cause: str) -> None:
        """`cause` is the map's."""
        kind = next((kind for kind in MAP_CAUSES if cause.startswith(kind)), "other")
        self.maps.labels(kind).inc()

    def _begin_series(self) -> None:
        """From 0 on: a series that begins with 1 has not increased for who watches it."""
        for cause in SuspicionReason:
            self.verdicts.labels(cause.value)
        for kind in AlarmKind:
            self.alarms.labels(kind.value)
        for map_cause in (*MAP_CAUSES, "other"):
            self.maps.labels(map_cause)
        for phase in ("verdict", "publish"):
            self.recovery_s.labels(phase)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge("starfish_" + name, text, registry=self.registry)


@asynccontextmanager
async def http_endpoint(
    metrics: Metrics, health: Callable[[], dict[str, object]], *, host: str, port: int
) -> AsyncIterator[int]:
    """Serves while the body runs, and yields the port. Raises ConfigError if the port is taken."""

    async def show_health(_: web.Request) -> web.Response:
        return web.json_response(health())

    routes = [
        web.get("/metrics", metrics_handler(metrics.registry, metrics.tolerance.update)),
        web.get("/health", show_health),
    ]
    async with serve_routes(routes, host=host, port=port, flags="--port or --host") as bound:
        yield bound
