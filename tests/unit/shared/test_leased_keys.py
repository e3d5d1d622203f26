"""Leased keys: what was said stands, again after the lease or etcd was away, and goes at the end; a
lease that is gone is noticed soon. On virtual time, which waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from shared.leased_keys import (
    ANSWER_MIN_S,
    DEFERRED_WRITE_S,
    KEEP_ALIVE_RETRY_S,
    RETRY_MAX_S,
    LeasedKeys,
)
from shared.store import Put, WatchEvent
from tests.sim.sim_loop import SimLoop
from tests.support.memory_store import MemoryEtcd, MemoryStore

TTL_S = 6.0
SOON_S = 0.001
RETRIED_S = 1.5 * RETRY_MAX_S + SOON_S


def on_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        with asyncio.Runner(loop_factory=SimLoop) as runner:
            runner.run(test())

    return run


class LoopClock:
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return self.now()


class LateStore(MemoryStore):
    """Writes happen at once, and are answered once `answers` is set."""

    def __init__(self, etcd: MemoryEtcd) -> None:
        super().__init__(etcd)
        self.answers = asyncio.Event()
        self.answers.set()

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        revision = await super().put(key, value, lease_id=lease_id)
        await self.answers.wait()
        return revision


class LosingStore(MemoryStore):
    """The first `num_lost` writes get lost on their way, and nobody says so."""

    num_lost = 0

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        if self.num_lost > 0:
            self.num_lost -= 1
            await asyncio.Event().wait()
        return await super().put(key, value, lease_id=lease_id)


class LeasedKeysHarness:
    def __init__(self, *, has_lease: bool) -> None:
        self.etcd = MemoryEtcd(LoopClock())
        self.store = LateStore(self.etcd)
        lease_id = self.etcd.grant(TTL_S) if has_lease else 0
        self.leased = LeasedKeys(self.store, ttl_s=TTL_S, lease_id=lease_id)
        self.lost: list[int] = []
        self.changes: list[tuple[str, bytes | None]] = []

    @property
    def values_in_etcd(self) -> dict[str, bytes]:
        self.etcd.expire()
        return {key: kv.value for key, kv in self.etcd.values.items()}

    def lease_of(self, key: str) -> int:
        return self.etcd.values[key].lease_id

    def lose_lease(self) -> int:
        lease_id = self.leased.lease_id
        self.etcd.revoke(lease_id)
        return lease_id

    async def follow(self) -> None:
        async with contextlib.aclosing(self.etcd.client().watch("")) as watch:
            async for seen in watch:
                if isinstance(seen, WatchEvent):
                    self.changes.append((seen.key, seen.value))

    async def note_losses(self) -> None:
        while True:
            await self.leased.keep_alive()
            self.lost.append(self.leased.lease_id)
            await self.leased.renew()


@contextlib.asynccontextmanager
async def at_work(
    harness: LeasedKeysHarness, *work: Coroutine[Any, Any, None]
) -> AsyncIterator[LeasedKeysHarness]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(each) for each in (harness.follow(), *work)]
        await asyncio.sleep(SOON_S)
        yield harness
        for task in running:
            task.cancel()


def left_alone() -> contextlib.AbstractAsyncContextManager[LeasedKeysHarness]:
    harness = LeasedKeysHarness(has_lease=False)
    return at_work(harness, harness.leased.run())


def driven() -> contextlib.AbstractAsyncContextManager[LeasedKeysHarness]:
    """By an owner that was given a lease."""
    harness = LeasedKeysHarness(has_lease=True)
    return at_work(harness, harness.leased.write(), harness.note_losses())


@on_virtual_time
async def test_what_was_said_stands_under_the_lease() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        assert harness.values_in_etcd == {"a": b"1"}
        assert harness.lease_of("a") == harness.leased.lease_id != 0


@on_virtual_time
async def test_a_value_that_is_overtaken_is_never_written() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        harness.leased.put("b", b"1")
        harness.leased.put("a", b"2")
        await asyncio.sleep(SOON_S)
        assert harness.changes == [("b", b"1"), ("a", b"2")]


@on_virtual_time
async def test_a_value_said_during_the_write_of_an_older_one_is_written_after_it() -> None:
    async with left_alone() as harness:
        harness.store.answers.clear()
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        harness.leased.put("a", b"2")
        harness.store.answers.set()
        await asyncio.sleep(SOON_S)
        assert harness.changes == [("a", b"1"), ("a", b"2")]


@on_virtual_time
async def test_what_comes_before_others_waits_for_the_write_under_way_alone() -> None:
    async with left_alone() as harness:
        harness.store.answers.clear()
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        harness.leased.put("b", b"1")
        harness.leased.put("c", b"1")
        harness.leased.put("d", b"1", before_others=True)
        harness.store.answers.set()
        await asyncio.sleep(SOON_S)
        assert [key for key, _ in harness.changes] == ["a", "d", "b", "c"]


@on_virtual_time
async def test_a_deleted_key_goes_and_others_stay() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        harness.leased.put("b", b"1")
        harness.etcd.apply([Put(key="of another", value=b"1")])
        await asyncio.sleep(SOON_S)
        harness.leased.delete("a")
        harness.leased.delete("of another")
        await asyncio.sleep(SOON_S)
        assert harness.values_in_etcd == {"b": b"1", "of another": b"1"}


@on_virtual_time
async def test_what_is_not_urgent_is_written_later_or_with_what_is() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1", urgent=False)
        await asyncio.sleep(DEFERRED_WRITE_S / 2)
        assert harness.values_in_etcd == {}
        await asyncio.sleep(DEFERRED_WRITE_S)
        assert harness.values_in_etcd == {"a": b"1"}
        harness.leased.delete("a", urgent=False)
        harness.leased.put("b", b"1")
        await asyncio.sleep(SOON_S)
        assert harness.values_in_etcd == {"b": b"1"}


@on_virtual_time
async def test_it_stands_for_longer_than_a_lease_lasts() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(10 * TTL_S)
        assert harness.values_in_etcd == {"a": b"1"}
        assert harness.changes == [("a", b"1")]


@on_virtual_time
async def test_release_takes_everything_back() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        await harness.leased.release()
        assert harness.values_in_etcd == {}


@on_virtual_time
async def test_release_is_harmless_without_a_lease_and_without_etcd() -> None:
    harness = LeasedKeysHarness(has_lease=False)
    harness.store.reachable = False
    await harness.leased.release()
    harness = LeasedKeysHarness(has_lease=True)
    harness.store.reachable = False
    await harness.leased.release()


@on_virtual_time
async def test_after_a_lost_lease_all_is_said_again_under_a_new_one() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        lost = harness.lose_lease()
        harness.leased.put("b", b"2")
        await asyncio.sleep(RETRIED_S)
        assert harness.values_in_etcd == {"a": b"1", "b": b"2"}
        assert harness.lease_of("a") == harness.lease_of("b") != lost


@on_virtual_time
async def test_a_loss_that_no_write_meets_is_seen_by_the_next_keep_alive() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        harness.lose_lease()
        await asyncio.sleep(TTL_S / 3 + SOON_S)
        assert harness.values_in_etcd == {"a": b"1"}


@on_virtual_time
async def test_a_write_that_was_answered_after_its_lease_was_lost_is_repeated() -> None:
    async with left_alone() as harness:
        harness.store.answers.clear()
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        harness.lose_lease()
        harness.leased.recheck_lease()
        await asyncio.sleep(SOON_S)
        assert harness.values_in_etcd == {}
        harness.store.answers.set()
        await asyncio.sleep(SOON_S)
        assert harness.values_in_etcd == {"a": b"1"}


@on_virtual_time
async def test_what_was_said_while_etcd_was_away_is_written_when_it_is_back() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        harness.store.reachable = False
        harness.leased.put("b", b"2")
        harness.leased.delete("a")
        await asyncio.sleep(TTL_S / 2)
        harness.store.reachable = True
        await asyncio.sleep(RETRIED_S)
        assert harness.values_in_etcd == {"b": b"2"}


@on_virtual_time
async def test_an_etcd_that_comes_back_after_the_lease_hears_all_again() -> None:
    async with left_alone() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        harness.store.reachable = False
        await asyncio.sleep(2 * TTL_S)
        assert harness.values_in_etcd == {}
        harness.store.reachable = True
        await asyncio.sleep(KEEP_ALIVE_RETRY_S + SOON_S)
        assert harness.values_in_etcd == {"a": b"1"}


@on_virtual_time
async def test_without_etcd_at_the_start_all_is_written_once_it_is_there() -> None:
    harness = LeasedKeysHarness(has_lease=False)
    harness.store.reachable = False
    running = asyncio.create_task(harness.leased.run())
    harness.leased.put("a", b"1")
    await asyncio.sleep(TTL_S)
    harness.store.reachable = True
    await asyncio.sleep(RETRIED_S)
    assert harness.lease_of("a") == harness.leased.lease_id != 0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@on_virtual_time
async def test_a_lease_that_was_given_is_used() -> None:
    async with driven() as harness:
        given = harness.leased.lease_id
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        assert harness.lease_of("a") == given


@on_virtual_time
async def test_a_write_that_finds_the_lease_gone_tells_at_once() -> None:
    async with driven() as harness:
        lost = harness.lose_lease()
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        assert harness.lost == [lost]


@on_virtual_time
async def test_what_the_lost_lease_held_is_its_owners_to_say_again() -> None:
    async with driven() as harness:
        harness.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        harness.lose_lease()
        harness.leased.put("b", b"2")
        await asyncio.sleep(RETRIED_S)
        assert harness.values_in_etcd == {"b": b"2"}


@on_virtual_time
async def test_a_doubt_is_looked_into_at_once_and_means_nothing_by_itself() -> None:
    async with driven() as harness:
        harness.leased.recheck_lease()
        await asyncio.sleep(SOON_S)
        assert harness.lost == []
        lost = harness.lose_lease()
        harness.leased.recheck_lease()
        await asyncio.sleep(SOON_S)
        assert harness.lost == [lost]


@on_virtual_time
async def test_each_loss_is_told_once() -> None:
    async with driven() as harness:
        first = harness.lose_lease()
        for _ in range(3):
            harness.leased.recheck_lease()
            await asyncio.sleep(SOON_S)
        assert harness.lost == [first]
        second = harness.lose_lease()
        harness.leased.recheck_lease()
        await asyncio.sleep(SOON_S)
        assert harness.lost == [first, second]


@on_virtual_time
async def test_a_cancellation_beside_a_doubt_is_not_swallowed() -> None:
    harness = LeasedKeysHarness(has_lease=True)
    task = asyncio.create_task(harness.leased.keep_alive())
    await asyncio.sleep(SOON_S)
    harness.leased.recheck_lease()
    task.cancel()
    await asyncio.sleep(SOON_S)
    assert task.cancelled()


@on_virtual_time
async def test_what_got_lost_on_its_way_is_sent_again() -> None:
    """As with etcd's leader, whose host is gone."""
    etcd = MemoryEtcd(LoopClock())
    store = LosingStore(etcd)
    leased = LeasedKeys(store, ttl_s=TTL_S, lease_id=etcd.grant(TTL_S))
    writing = asyncio.ensure_future(leased.write())
    store.num_lost = 2
    leased.put("a", b"1")
    leased.put("b", b"2")
    await asyncio.sleep(3 * ANSWER_MIN_S + 2 * RETRIED_S)
    assert {key: kv.value for key, kv in etcd.values.items()} == {"a": b"1", "b": b"2"}
    writing.cancel()
