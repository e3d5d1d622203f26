"""Leased keys: what was said stands, again after the lease or etcd was away, and goes at the end; a
lease that is gone is noticed soon. On virtual time, which waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from shared.leased_keys import KEEP_ALIVE_RETRY_S, LATER_S, RETRY_MAX_S, LeasedKeys
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


class Bench:
    def __init__(self, *, has_lease: bool) -> None:
        self.etcd = MemoryEtcd(LoopClock())
        self.store = LateStore(self.etcd)
        lease_id = self.etcd.grant(TTL_S) if has_lease else 0
        self.leased = LeasedKeys(self.store, ttl_s=TTL_S, lease_id=lease_id)
        self.lost: list[int] = []
        self.changes: list[tuple[str, bytes | None]] = []

    @property
    def standing(self) -> dict[str, bytes]:
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
async def at_work(bench: Bench, *work: Coroutine[Any, Any, None]) -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(each) for each in (bench.follow(), *work)]
        await asyncio.sleep(SOON_S)
        yield bench
        for task in running:
            task.cancel()


def left_alone() -> contextlib.AbstractAsyncContextManager[Bench]:
    bench = Bench(has_lease=False)
    return at_work(bench, bench.leased.run())


def driven() -> contextlib.AbstractAsyncContextManager[Bench]:
    """By an owner that was given a lease."""
    bench = Bench(has_lease=True)
    return at_work(bench, bench.leased.write(), bench.note_losses())


@on_virtual_time
async def test_what_was_said_stands_under_the_lease() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        assert bench.standing == {"a": b"1"}
        assert bench.lease_of("a") == bench.leased.lease_id != 0


@on_virtual_time
async def test_a_value_that_is_overtaken_is_never_written() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        bench.leased.put("b", b"1")
        bench.leased.put("a", b"2")
        await asyncio.sleep(SOON_S)
        assert bench.changes == [("b", b"1"), ("a", b"2")]


@on_virtual_time
async def test_a_value_said_during_the_write_of_an_older_one_is_written_after_it() -> None:
    async with left_alone() as bench:
        bench.store.answers.clear()
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        bench.leased.put("a", b"2")
        bench.store.answers.set()
        await asyncio.sleep(SOON_S)
        assert bench.changes == [("a", b"1"), ("a", b"2")]


@on_virtual_time
async def test_a_deleted_key_goes_and_others_stay() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        bench.leased.put("b", b"1")
        bench.etcd.apply([Put(key="of another", value=b"1")])
        await asyncio.sleep(SOON_S)
        bench.leased.delete("a")
        bench.leased.delete("of another")
        await asyncio.sleep(SOON_S)
        assert bench.standing == {"b": b"1", "of another": b"1"}


@on_virtual_time
async def test_what_is_not_urgent_is_written_later_or_with_what_is() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1", urgent=False)
        await asyncio.sleep(LATER_S / 2)
        assert bench.standing == {}
        await asyncio.sleep(LATER_S)
        assert bench.standing == {"a": b"1"}
        bench.leased.delete("a", urgent=False)
        bench.leased.put("b", b"1")
        await asyncio.sleep(SOON_S)
        assert bench.standing == {"b": b"1"}


@on_virtual_time
async def test_it_stands_for_longer_than_a_lease_lasts() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(10 * TTL_S)
        assert bench.standing == {"a": b"1"}
        assert bench.changes == [("a", b"1")]


@on_virtual_time
async def test_release_takes_everything_back() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        await bench.leased.release()
        assert bench.standing == {}


@on_virtual_time
async def test_release_is_harmless_without_a_lease_and_without_etcd() -> None:
    bench = Bench(has_lease=False)
    bench.store.reachable = False
    await bench.leased.release()
    bench = Bench(has_lease=True)
    bench.store.reachable = False
    await bench.leased.release()


@on_virtual_time
async def test_after_a_lost_lease_all_is_said_again_under_a_new_one() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        lost = bench.lose_lease()
        bench.leased.put("b", b"2")
        await asyncio.sleep(RETRIED_S)
        assert bench.standing == {"a": b"1", "b": b"2"}
        assert bench.lease_of("a") == bench.lease_of("b") != lost


@on_virtual_time
async def test_a_loss_that_no_write_meets_is_seen_by_the_next_keep_alive() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        bench.lose_lease()
        await asyncio.sleep(TTL_S / 3 + SOON_S)
        assert bench.standing == {"a": b"1"}


@on_virtual_time
async def test_a_write_that_was_answered_after_its_lease_was_lost_is_repeated() -> None:
    async with left_alone() as bench:
        bench.store.answers.clear()
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        bench.lose_lease()
        await asyncio.sleep(TTL_S / 3 + SOON_S)
        assert bench.standing == {}
        bench.store.answers.set()
        await asyncio.sleep(SOON_S)
        assert bench.standing == {"a": b"1"}


@on_virtual_time
async def test_what_was_said_while_etcd_was_away_is_written_when_it_is_back() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        bench.store.reachable = False
        bench.leased.put("b", b"2")
        bench.leased.delete("a")
        await asyncio.sleep(TTL_S / 2)
        bench.store.reachable = True
        await asyncio.sleep(RETRIED_S)
        assert bench.standing == {"b": b"2"}


@on_virtual_time
async def test_an_etcd_that_comes_back_after_the_lease_hears_all_again() -> None:
    async with left_alone() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        bench.store.reachable = False
        await asyncio.sleep(2 * TTL_S)
        assert bench.standing == {}
        bench.store.reachable = True
        await asyncio.sleep(KEEP_ALIVE_RETRY_S + SOON_S)
        assert bench.standing == {"a": b"1"}


@on_virtual_time
async def test_without_etcd_at_the_start_all_is_written_once_it_is_there() -> None:
    bench = Bench(has_lease=False)
    bench.store.reachable = False
    running = asyncio.create_task(bench.leased.run())
    bench.leased.put("a", b"1")
    await asyncio.sleep(TTL_S)
    bench.store.reachable = True
    await asyncio.sleep(RETRIED_S)
    assert bench.lease_of("a") == bench.leased.lease_id != 0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@on_virtual_time
async def test_a_lease_that_was_given_is_used() -> None:
    async with driven() as bench:
        given = bench.leased.lease_id
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        assert bench.lease_of("a") == given


@on_virtual_time
async def test_a_write_that_finds_the_lease_gone_tells_at_once() -> None:
    async with driven() as bench:
        lost = bench.lose_lease()
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        assert bench.lost == [lost]


@on_virtual_time
async def test_what_the_lost_lease_held_is_its_owners_to_say_again() -> None:
    async with driven() as bench:
        bench.leased.put("a", b"1")
        await asyncio.sleep(SOON_S)
        bench.lose_lease()
        bench.leased.put("b", b"2")
        await asyncio.sleep(RETRIED_S)
        assert bench.standing == {"b": b"2"}


@on_virtual_time
async def test_a_doubt_is_looked_into_at_once_and_means_nothing_by_itself() -> None:
    async with driven() as bench:
        bench.leased.doubt_lease()
        await asyncio.sleep(SOON_S)
        assert bench.lost == []
        lost = bench.lose_lease()
        bench.leased.doubt_lease()
        await asyncio.sleep(SOON_S)
        assert bench.lost == [lost]


@on_virtual_time
async def test_each_loss_is_told_once() -> None:
    async with driven() as bench:
        first = bench.lose_lease()
        for _ in range(3):
            bench.leased.doubt_lease()
            await asyncio.sleep(SOON_S)
        assert bench.lost == [first]
        second = bench.lose_lease()
        bench.leased.doubt_lease()
        await asyncio.sleep(SOON_S)
        assert bench.lost == [first, second]


@on_virtual_time
async def test_a_cancellation_beside_a_doubt_is_not_swallowed() -> None:
    bench = Bench(has_lease=True)
    task = asyncio.create_task(bench.leased.keep_alive())
    await asyncio.sleep(SOON_S)
    bench.leased.doubt_lease()
    task.cancel()
    await asyncio.sleep(SOON_S)
    assert task.cancelled()
