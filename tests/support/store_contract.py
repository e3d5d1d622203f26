"""What every `shared.store.Store` must do. Subclass it where the fixtures `store`, `prefix` (unique
to the test, ends in "/") and `pass_time` are defined."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from shared.errors import LeaseLost, StoreError, TxnConflict
from shared.store import Compare, Delete, Put, Snapshot, Store, WatchEvent

WAIT_S = 30.0
Watch = AsyncGenerator[Snapshot | WatchEvent, None]


async def next_of(watch: Watch) -> Snapshot | WatchEvent:
    return await asyncio.wait_for(anext(watch), WAIT_S)


async def next_event(watch: Watch) -> WatchEvent:
    item = await next_of(watch)
    assert isinstance(item, WatchEvent)
    return item


class StoreContract:
    async def test_a_key_that_was_never_put_is_none(self, store: Store, prefix: str) -> None:
        assert await store.get(prefix + "a") is None

    async def test_put_returns_the_revision_that_get_shows(self, store: Store, prefix: str) -> None:
        first = await store.put(prefix + "a", b"1")
        second = await store.put(prefix + "a", b"2")
        found = await store.get(prefix + "a")
        assert found is not None
        assert (found.value, found.create_revision, found.mod_revision) == (b"2", first, second)
        assert second > first

    async def test_a_prefix_holds_its_keys_in_order_and_no_others(
        self, store: Store, prefix: str
    ) -> None:
        for name in ("b", "a", "a/x"):
            await store.put(prefix + name, name.encode())
        await store.put(prefix[:-1] + "0", b"a neighbour")
        snapshot = await store.get_prefix(prefix)
        assert [kv.key for kv in snapshot.values] == [prefix + n for n in ("a", "a/x", "b")]

    async def test_delete_says_whether_the_key_existed(self, store: Store, prefix: str) -> None:
        await store.put(prefix + "a", b"1")
        assert await store.delete(prefix + "a") is True
        assert await store.delete(prefix + "a") is False
        assert await store.get(prefix + "a") is None

    async def test_txn_does_all_at_one_revision(self, store: Store, prefix: str) -> None:
        old = await store.put(prefix + "old", b"")
        revision = await store.txn(
            [Compare(key=prefix + "old", mod_revision=old)],
            [Delete(key=prefix + "old"), Put(key=prefix + "new", value=b"n")],
        )
        snapshot = await store.get_prefix(prefix)
        assert [(kv.key, kv.mod_revision) for kv in snapshot.values] == [(prefix + "new", revision)]

    @pytest.mark.parametrize("case", ["moved", "gone", "exists"])
    async def test_txn_with_a_failed_compare_does_nothing(
        self, store: Store, prefix: str, case: str
    ) -> None:
        revision = await store.put(prefix + "a", b"1")
        if case == "moved":
            await store.put(prefix + "a", b"2")
        if case == "gone":
            await store.delete(prefix + "a")
        compared = 0 if case == "exists" else revision
        with pytest.raises(TxnConflict) as caught:
            await store.txn(
                [Compare(key=prefix + "a", mod_revision=compared)],
                [Put(key=prefix + "b", value=b"")],
            )
        assert caught.value.definitely_not_done
        assert await store.get(prefix + "b") is None

    async def test_txn_may_not_name_a_key_twice(self, store: Store, prefix: str) -> None:
        with pytest.raises(StoreError):
            await store.txn([], [Put(key=prefix + "a", value=b"1")] * 2)
        assert await store.get(prefix + "a") is None

    async def test_a_revoked_lease_takes_its_keys_along(self, store: Store, prefix: str) -> None:
        lease = await store.grant_lease(30)
        await store.put(prefix + "a", b"", lease_id=lease)
        await store.put(prefix + "b", b"")
        found = await store.get(prefix + "a")
        assert found is not None
        assert found.lease_id == lease
        await store.revoke_lease(lease)
        await store.revoke_lease(lease)
        assert [kv.key for kv in (await store.get_prefix(prefix)).values] == [prefix + "b"]

    async def test_a_put_without_lease_frees_the_key_from_its_lease(
        self, store: Store, prefix: str
    ) -> None:
        lease = await store.grant_lease(30)
        await store.put(prefix + "a", b"", lease_id=lease)
        await store.put(prefix + "a", b"")
        await store.revoke_lease(lease)
        assert await store.get(prefix + "a") is not None

    async def test_nothing_goes_under_a_lease_that_is_gone(self, store: Store, prefix: str) -> None:
        lease = await store.grant_lease(30)
        await store.revoke_lease(lease)
        with pytest.raises(LeaseLost):
            await store.keep_alive(lease)
        with pytest.raises(LeaseLost):
            await store.put(prefix + "a", b"", lease_id=lease)
        with pytest.raises(LeaseLost):
            await store.txn([], [Put(key=prefix + "a", value=b"", lease_id=lease)])
        assert await store.get(prefix + "a") is None

    async def test_a_lease_lives_as_long_as_it_is_kept_alive(
        self, store: Store, prefix: str, pass_time: Callable[[float], Awaitable[None]]
    ) -> None:
        kept, forgotten = await store.grant_lease(4), await store.grant_lease(4)
        await store.put(prefix + "kept", b"", lease_id=kept)
        await store.put(prefix + "forgotten", b"", lease_id=forgotten)
        left = [prefix + "forgotten", prefix + "kept"]
        for num_passed in range(60):
            if num_passed >= 8 and left == [prefix + "kept"]:  # it has outlived its time
                break
            await pass_time(0.6)
            assert await store.keep_alive(kept) > 0
            left = [kv.key for kv in (await store.get_prefix(prefix)).values]
        assert left == [prefix + "kept"]

    async def test_a_watch_begins_with_what_is_there(self, store: Store, prefix: str) -> None:
        revision = await store.put(prefix + "a", b"1")
        watch = store.watch(prefix)
        snapshot = await next_of(watch)
        assert isinstance(snapshot, Snapshot)
        assert snapshot.revision >= revision
        assert [(kv.key, kv.value) for kv in snapshot.values] == [(prefix + "a", b"1")]
        await watch.aclose()

    async def test_a_watch_shows_every_change_in_order(self, store: Store, prefix: str) -> None:
        lease = await store.grant_lease(30)
        watch = store.watch(prefix)
        await next_of(watch)
        revisions = [await store.put(prefix + str(i), b"%d" % i) for i in range(200)]
        await store.put(prefix[:-1] + "0", b"a neighbour")
        await store.delete(prefix + "7")
        await store.put(prefix + "leased", b"", lease_id=lease)
        await store.revoke_lease(lease)
        events = [await next_event(watch) for _ in range(203)]
        assert [e.mod_revision for e in events[:200]] == revisions
        assert [e.value for e in events[:200]] == [b"%d" % i for i in range(200)]
        assert [(e.key, e.value, e.lease_id) for e in events[200:]] == [
            (prefix + "7", None, 0),
            (prefix + "leased", b"", lease),
            (prefix + "leased", None, 0),
        ]
        await watch.aclose()

    async def test_a_txn_reaches_a_watch_as_one_revision(self, store: Store, prefix: str) -> None:
        watch = store.watch(prefix)
        await next_of(watch)
        puts = [Put(key=prefix + name, value=b"") for name in ("a", "b", "c")]
        revision = await store.txn([], puts)
        events = [await next_event(watch) for _ in range(3)]
        assert {e.mod_revision for e in events} == {revision}
        await watch.aclose()

    async def test_closing_the_store_ends_its_watches(self, store: Store, prefix: str) -> None:
        watch = store.watch(prefix)
        await next_of(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await store.close()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, WAIT_S)
