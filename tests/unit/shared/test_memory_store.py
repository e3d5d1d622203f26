"""The in-memory twin of etcd keeps the store's contract, and can be cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shared.errors import StoreUnavailable
from shared.store import WatchEvent
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd, MemoryStore
from tests.support.store_contract import StoreContract, next_event, next_of


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def etcd(clock: FakeClock) -> MemoryEtcd:
    return MemoryEtcd(clock)


@pytest.fixture
def store(etcd: MemoryEtcd) -> MemoryStore:
    return etcd.client()


@pytest.fixture
def prefix() -> str:
    return "/test/"


@pytest.fixture
def pass_time(clock: FakeClock) -> Callable[[float], Awaitable[None]]:
    async def advance(seconds: float) -> None:
        clock.advance(seconds)

    return advance


class TestMemoryStore(StoreContract):
    pass


async def test_a_partitioned_client_fails_and_its_watch_catches_up(etcd: MemoryEtcd) -> None:
    cut, whole = etcd.client(), etcd.client()
    watch = cut.watch("/test/")
    await next_of(watch)
    cut.reachable = False
    with pytest.raises(StoreUnavailable):
        await cut.put("/test/a", b"")
    await whole.put("/test/b", b"")
    waiting = asyncio.ensure_future(next_event(watch))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    cut.reachable = True
    event: WatchEvent = await waiting
    assert event.key == "/test/b"
    await watch.aclose()


async def test_a_lost_reply_leaves_the_outcome_unknown(etcd: MemoryEtcd) -> None:
    client = etcd.client()
    client.replies_lost = True
    with pytest.raises(StoreUnavailable) as caught:
        await client.put("/test/a", b"")
    assert not caught.value.definitely_not_done
    assert "/test/a" in etcd.values
