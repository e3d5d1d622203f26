"""Faults of hosts and of the network between them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field

from cli.bench.chaos.cluster import Cluster, ClusterHost
from cli.bench.chaos.network import Namespace
from cli.bench.chaos.processes import ProcessKind
from cli.bench.chaos.site import Site

_NEEDS_HOSTS = "needs several hosts: pass --hosts 3, as root"


def _cluster(site: Site) -> Cluster:
    assert site.cluster is not None, "`missing` comes first"
    return site.cluster


@dataclass(slots=True, kw_only=True)
class PowerLoss:
    """A host is off until `heal`."""

    name: str
    summary: str
    hold_s: float
    target_ms: float | None = None
    _host: ClusterHost | None = None

    def missing(self, site: Site) -> str | None:
        return None if site.cluster else _NEEDS_HOSTS

    async def inject(self, site: Site, rng: random.Random) -> str:
        self._host = rng.choice(_cluster(site).rank_hosts)
        await self._host.power_off()
        return self._host.name

    async def heal(self, site: Site) -> None:
        if self._host is not None:
            await self._host.power_on()
            self._host = None


@dataclass(slots=True, kw_only=True)
class LinkDown:
    """Nothing reaches a host, nor leaves it."""

    name: str
    summary: str
    hold_s: float
    target_ms: float | None = None

    def missing(self, site: Site) -> str | None:
        return None if site.cluster else _NEEDS_HOSTS

    async def inject(self, site: Site, rng: random.Random) -> str:
        cluster = _cluster(site)
        host = rng.choice(cluster.rank_hosts)
        namespaces = set(host.namespaces.values())
        for namespace in namespaces:
            await asyncio.to_thread(cluster.network.cut, namespace)
        return ", ".join(sorted(namespace.name for namespace in namespaces))

    async def heal(self, site: Site) -> None:
        await asyncio.to_thread(_cluster(site).network.heal)


@dataclass(slots=True, kw_only=True)
class Partition:
    """One service (the leading one, of control planes) and `far_ends` hosts of another kind, or all
    etcd members, do not reach each other. `is_one_way`: only the way from the first is cut."""

    name: str
    summary: str
    between: tuple[ProcessKind, ProcessKind]
    hold_s: float
    is_one_way: bool = False
    far_ends: int = 1
    target_ms: float | None = None

    def missing(self, site: Site) -> str | None:
        return None if site.cluster else _NEEDS_HOSTS

    async def inject(self, site: Site, rng: random.Random) -> str:
        cluster = _cluster(site)
        near = rng.choice(self._near_ends(site, cluster))
        kind = self.between[1]
        others = [each for each in cluster.namespaces(kind) if each is not near]
        far = others if kind is ProcessKind.ETCD else rng.sample(others, self.far_ends)
        for each in far:
            await asyncio.to_thread(cluster.network.drop, near, each)
            if not self.is_one_way:
                await asyncio.to_thread(cluster.network.drop, each, near)
        arrow = "->" if self.is_one_way else "<->"
        return f"{near.name} {arrow} {', '.join(each.name for each in far)}"

    def _near_ends(self, site: Site, cluster: Cluster) -> list[Namespace]:
        kind = self.between[0]
        if kind is not ProcessKind.CONTROL_PLANE:
            return cluster.namespaces(kind)
        marks = {process.mark for process in site.leader()}
        return [
            host.namespaces[kind]
            for host in cluster.hosts
            if kind in host.namespaces and (host.mark in marks or not marks)
        ]

    async def heal(self, site: Site) -> None:
        await asyncio.to_thread(_cluster(site).network.heal)


@dataclass(slots=True, kw_only=True)
class BadLink:
    """The link of a host's ranks loses or delays what goes over it, in both directions."""

    name: str
    summary: str
    hold_s: float
    delay_s: float = 0.0
    loss: float = 0.0
    target_ms: float | None = None
    _relays: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def missing(self, site: Site) -> str | None:
        return None if site.cluster else _NEEDS_HOSTS

    async def inject(self, site: Site, rng: random.Random) -> str:
        cluster = _cluster(site)
        host = rng.choice(cluster.namespaces(ProcessKind.RANK))
        relay = cluster.network.relayed(host, self.delay_s, self.loss)
        await asyncio.to_thread(self._relays.enter_context, relay)
        return host.name

    async def heal(self, site: Site) -> None:
        await asyncio.to_thread(self._relays.close)
