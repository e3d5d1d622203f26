"""What etcd can do to an instance beyond being away: restarts, compaction while a watcher is cut
off, reads that arrive late, leases that it ends by itself, a full disk. Drawn from the seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from tests.sim.cluster import ETCD, SimCluster
from tests.support.memory_store import MemoryStore


class EtcdFaults:
    """`done` says what and when. If `harmless`, no rank is touched."""

    def __init__(self, cluster: SimCluster, within_s: float, *, harmless: bool) -> None:
        self._cluster = cluster
        self._rng = random.Random(cluster.seed * 15485863 + 3)
        self._within_s = within_s
        self._harmless = harmless
        self.done: list[str] = []

    async def run(self) -> None:
        faults: list[Callable[[], Awaitable[None]]] = [
            self._restart,
            self._compact_at_the_leaders_end,
            self._compact_behind_a_cut,
            self._stale_reread,
            self._fill_disk,
        ]
        num_faults = self._rng.randint(1, 3)
        times = sorted(self._rng.uniform(0.0, self._within_s) for _ in range(num_faults))
        now = 0.0
        async with asyncio.TaskGroup() as tasks:
            for at in times:
                await asyncio.sleep(at - now)
                now = at
                tasks.create_task(self._rng.choice(faults)())  # type: ignore[arg-type]

    def _log_fault(self, text: str) -> None:
        self.done.append(f"{self._cluster.clock.now() - 1000:.3f} {text}")

    def _stores(self, hosts: list[str]) -> list[MemoryStore]:
        return [store for host, store in self._cluster._stores if host in hosts]

    def _plane_hosts(self) -> list[str]:
        return [host for host in self._cluster.hosts() if host.startswith("host-plane")]

    async def _restart(self) -> None:
        seconds = self._rng.choice([0.1, 1.0, 3.0])
        self._log_fault(f"restart etcd, away for {seconds} s")
        hosts = [host for host in self._cluster.hosts() if host != ETCD]
        await self._cut_off(hosts, seconds)
        self._cluster.etcd.restart()
        if self._rng.random() < 0.5:
            self._compact(self._cluster.etcd.revision - self._rng.randint(0, 30))
        self._reconnect(hosts)

    async def _compact_at_the_leaders_end(self) -> None:
        """All control planes miss the end of the leader's lease, and history begins with it."""
        etcd, planes = self._cluster.etcd, self._plane_hosts()
        self._log_fault("cut the control planes from etcd until the leader's lease has ended")
        await self._cut_off(planes, 0.0)
        for _ in range(400):
            if self._cluster.keys.leader not in etcd.values:
                self._compact(etcd.revision)
                break
            await asyncio.sleep(0.01)
        self._reconnect(planes)

    async def _compact_behind_a_cut(self) -> None:
        """Somebody misses changes, and some or all of them are compacted away."""
        host = self._rng.choice([host for host in self._cluster.hosts() if host != ETCD])
        seconds = self._rng.choice([0.3, 1.0, 3.0])
        before = self._cluster.etcd.revision
        self._log_fault(f"cut {host} from etcd for {seconds} s, and compact")
        await self._cut_off([host], seconds)
        self._compact(self._rng.randint(before, self._cluster.etcd.revision))
        self._reconnect([host])

    async def _stale_reread(self) -> None:
        """A write of unknown outcome makes the leader read etcd anew. Before the answer arrives,
        etcd ends the leader's lease and grants no other, as when its disk stalls."""
        stores = self._stores(self._plane_hosts())
        reply_s = self._rng.uniform(0.5, 1.9)
        self._log_fault(f"lose replies; reads take {reply_s:.2f} s")
        for store in stores:
            store.replies_lost, store.read_reply_s = True, reply_s
        if not self._harmless:  # the leader has something to write
            rank = self._rng.randrange(self._cluster.sizes.num_ranks)
            self._log_fault(f"kill rank {rank}")
            self._cluster.kill_rank(rank)
        await asyncio.sleep(self._rng.uniform(0.2, 0.6))
        for store in stores:
            store.replies_lost = False
        for _ in range(100):
            if any(store.num_reads_under_way for store in stores):
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(self._rng.uniform(0.0, 0.2))
        leader = self._cluster.etcd.values.get(self._cluster.keys.leader)
        if leader is not None:
            self._log_fault("end the leader's lease")
            self._cluster.etcd.revoke(leader.lease_id)
        self._cluster.etcd.disk_full = True
        await asyncio.sleep(2.0)
        self._cluster.etcd.disk_full = False
        for store in stores:
            store.read_reply_s = 0.0

    async def _fill_disk(self) -> None:
        seconds = self._rng.choice([0.5, 3.0, 8.0])
        self._log_fault(f"etcd's disk is full for {seconds} s")
        self._cluster.etcd.disk_full = True
        await asyncio.sleep(seconds)
        self._cluster.etcd.disk_full = False

    def _compact(self, revision: int) -> None:
        self._log_fault(f"compact {revision}")
        self._cluster.etcd.compact(revision)

    async def _cut_off(self, hosts: list[str], seconds: float) -> None:
        for host in hosts:
            self._cluster.sever(host, ETCD)
        for store in self._stores(hosts):
            store.break_streams()
        await asyncio.sleep(seconds)

    def _reconnect(self, hosts: list[str]) -> None:
        for host in hosts:
            self._cluster.reconnect(host, ETCD)
