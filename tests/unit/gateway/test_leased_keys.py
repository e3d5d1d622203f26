"""Leased keys: what was said stands, again after the lease or etcd was away, and goes at the
end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from gateway.leased_keys import LeasedKeys
from shared.clock import SystemClock
from tests.support.memory_store import MemoryEtcd, MemoryStore


class Bench:
    def __init__(self) -> None:
        self.etcd = MemoryEtcd(SystemClock())
        self.store: MemoryStore = self.etcd.client()
        self.leased = LeasedKeys(store=self.store, ttl_s=30, clock=SystemClock())

    async def settled(self, **wanted: bytes) -> None:
        """Until etcd holds exactly that."""
        async with asyncio.timeout(20):
            while True:
                if {key: kv.value for key, kv in self.etcd.values.items()} == wanted:
                    return
                await asyncio.sleep(0)


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    result = Bench()
    running = asyncio.create_task(result.leased.run())
    yield result
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_newest_value_stands_under_the_lease(bench: Bench) -> None:
    bench.leased.put("a", b"1")
    bench.leased.put("a", b"2")
    await bench.settled(a=b"2")
    assert bench.etcd.values["a"].lease_id


async def test_a_deleted_key_goes_and_others_stay(bench: Bench) -> None:
    bench.leased.put("a", b"1")
    bench.leased.put("b", b"1")
    await bench.settled(a=b"1", b=b"1")
    bench.leased.delete("a")
    bench.leased.delete("never put")
    await bench.settled(b=b"1")


async def test_release_takes_everything_back(bench: Bench) -> None:
    bench.leased.put("a", b"1")
    await bench.settled(a=b"1")
    await bench.leased.release()
    await bench.settled()


async def test_after_a_lost_lease_all_is_written_under_a_new_one(bench: Bench) -> None:
    bench.leased.put("a", b"1")
    await bench.settled(a=b"1")
    old = bench.etcd.values["a"].lease_id
    bench.etcd.revoke(old)
    bench.leased.put("b", b"2")
    await bench.settled(a=b"1", b=b"2")
    assert bench.etcd.values["a"].lease_id != old


async def test_what_was_said_while_etcd_was_away_is_written_later(bench: Bench) -> None:
    bench.leased.put("a", b"1")
    await bench.settled(a=b"1")
    bench.store.reachable = False
    bench.leased.put("b", b"2")
    bench.leased.delete("a")
    for _ in range(20):
        await asyncio.sleep(0)
    bench.store.reachable = True
    await bench.settled(b=b"2")
