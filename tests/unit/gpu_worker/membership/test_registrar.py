"""Registrar: a lease that is gone is noticed soon, and once; what was said stands again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from gpu_worker.membership.registrar import Registrar
from shared.clock import SystemClock
from tests.support.memory_store import MemoryEtcd, MemoryStore

TTL_S = 3000.0
"""A keep-alive that came by the clock would come too late for any test here."""


class Bench:
    def __init__(self) -> None:
        self.etcd = MemoryEtcd(SystemClock())
        self.store: MemoryStore = self.etcd.client()
        self.registrar = Registrar(self.store, lease_id=self.etcd.grant(TTL_S), lease_ttl_s=TTL_S)
        self.lost: list[int] = []

    def on_lost(self) -> None:
        self.lost.append(self.registrar.lease_id)

    def lose_lease(self) -> int:
        lease_id = self.registrar.lease_id
        self.etcd.revoke(lease_id)
        return lease_id


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    result = Bench()
    running = [
        asyncio.create_task(result.registrar.run()),
        asyncio.create_task(result.registrar.keep_alive(result.on_lost)),
    ]
    await turns()
    yield result
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_write_that_finds_the_lease_gone_tells_at_once(bench: Bench) -> None:
    lease_id = bench.lose_lease()
    bench.registrar.put("key", b"value")
    await turns()
    assert bench.lost == [lease_id]


async def test_a_doubt_is_looked_into_at_once_and_means_nothing_by_itself(bench: Bench) -> None:
    bench.registrar.doubt_lease()
    await turns()
    assert bench.lost == []
    lease_id = bench.lose_lease()
    bench.registrar.doubt_lease()
    await turns()
    assert bench.lost == [lease_id]


async def test_a_lost_lease_is_told_once_and_the_next_one_again(bench: Bench) -> None:
    first = bench.lose_lease()
    for _ in range(3):
        bench.registrar.doubt_lease()
        await turns()
    assert bench.lost == [first]
    await bench.registrar.renew()
    second = bench.lose_lease()
    bench.registrar.doubt_lease()
    await turns()
    assert bench.lost == [first, second]


async def test_a_cancellation_beside_a_doubt_is_not_swallowed(bench: Bench) -> None:
    task = asyncio.create_task(bench.registrar.keep_alive(bench.on_lost))
    await turns()
    bench.registrar.doubt_lease()
    task.cancel()
    await turns()
    assert task.cancelled()
