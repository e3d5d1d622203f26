"""The in-memory twin of etcd keeps the store's contract, and can be cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shared.errors import StoreUnavailable
from shared.store import Snapshot, WatchEvent
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


async def test_a_restart_of_etcd_loses_no_event(etcd: MemoryEtcd) -> None:
    store = etcd.client()
    watch = store.watch("/test/")
    await next_of(watch)
    await store.put("/test/a", b"under way")
    etcd.restart()
    await store.put("/test/b", b"later")
    assert [(await next_event(watch)).key for _ in "ab"] == ["/test/a", "/test/b"]
    await watch.aclose()


async def test_a_watch_that_is_behind_compaction_starts_over(etcd: MemoryEtcd) -> None:
    store = etcd.client()
    await store.put("/test/goes", b"")
    watch = store.watch("/test/")
    await next_of(watch)
    await store.delete("/test/goes")
    deleted_at = etcd.revision
    await store.put("/test/comes", b"")
    etcd.restart()
    etcd.compact(deleted_at)
    again = await next_of(watch)
    assert isinstance(again, Snapshot)
    assert [kv.key for kv in again.values] == ["/test/comes"]
    await watch.aclose()


async def test_a_stream_from_the_compacted_revision_lacks_its_deletion(etcd: MemoryEtcd) -> None:
    """As with the real etcd. A watch that would start after what it knows would lose it."""
    store = etcd.client()
    await store.put("/test/goes", b"")
    await store.delete("/test/goes")
    deleted_at = etcd.revision
    await store.put("/test/comes", b"")
    etcd.compact(deleted_at)
    assert [e.key for e in etcd._events_from(deleted_at, "/test/")] == ["/test/comes"]


async def test_an_etcd_that_lost_its_data_says_so(etcd: MemoryEtcd) -> None:
    store = etcd.client()
    for _ in range(3):
        await store.put("/test/a", b"")
    watch = store.watch("/test/")
    await next_of(watch)
    etcd.lose_data()
    again = await next_of(watch)
    assert isinstance(again, Snapshot)
    assert (again.values, again.restored) == ((), True)
    await watch.aclose()


async def test_a_full_disk_refuses_what_takes_space(etcd: MemoryEtcd) -> None:
    store = etcd.client()
    lease_id = await store.grant_lease(5)
    await store.put("/test/a", b"", lease_id=lease_id)
    etcd.disk_full = True
    with pytest.raises(StoreUnavailable):
        await store.put("/test/b", b"")
    with pytest.raises(StoreUnavailable):
        await store.grant_lease(5)
    assert await store.keep_alive(lease_id) == 5
    assert await store.delete("/test/a")


async def test_a_slow_read_brings_what_etcd_held_when_it_answered(etcd: MemoryEtcd) -> None:
    slow, store = etcd.client(), etcd.client()
    slow.read_reply_s = 0.01
    reading = asyncio.ensure_future(slow.get_prefix("/test/"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await store.put("/test/a", b"")
    assert (await reading).values == ()


async def test_a_lost_reply_leaves_the_outcome_unknown(etcd: MemoryEtcd) -> None:
    client = etcd.client()
    client.replies_lost = True
    with pytest.raises(StoreUnavailable) as caught:
        await client.put("/test/a", b"")
    assert not caught.value.definitely_not_done
    assert "/test/a" in etcd.values
