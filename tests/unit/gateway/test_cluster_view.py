"""The view of the instance: the newest map counts, and keys that vanish from etcd do not stop
serving."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.cluster_view import ClusterView, ClusterWatch
from shared.codec import pack
from shared.errors import OtherRelease
from shared.keys import Keys
from shared.records import pack_map
from shared.release import Release
from shared.types import Incarnation, Member, RankId
from tests.support.fake_clock import FakeClock
from tests.support.gateway_harness import toy_map, toy_spec
from tests.support.memory_store import MemoryEtcd
from tests.support.toy_rank import ToyRank

KEYS = Keys("i")
M0 = Member(rank=RankId(0), incarnation=Incarnation(1))
M1 = Member(rank=RankId(1), incarnation=Incarnation(1))


def test_an_older_map_changes_nothing() -> None:
    view = ClusterView().with_map(toy_map(5, [M0, M1]))
    assert view.with_map(toy_map(4, [M0])) is view
    assert view.with_map(toy_map(6, [M0])).members == (M0,)


async def test_an_etcd_that_lost_its_data_takes_the_ranks_but_not_the_map_and_the_spec() -> None:
    etcd = MemoryEtcd(FakeClock())
    store = etcd.client()
    rank_key = KEYS.rank(M0.rank, M0.incarnation)
    await store.put(KEYS.spec, pack(toy_spec(Path("m"))))
    await store.put(KEYS.map, pack_map(toy_map(3, [M0])))
    await store.put(rank_key, pack(ToyRank(0).record()))
    seen: asyncio.Queue[ClusterView] = asyncio.Queue()
    watch = ClusterWatch(store=store, keys=KEYS, listeners=(seen.put_nowait,))
    running = asyncio.create_task(watch.run())
    async with asyncio.timeout(10):
        known = await seen.get()
        assert list(known.ranks) == [rank_key]
        etcd.lose_data()
        after = await seen.get()
    assert not after.ranks
    assert (after.spec, after.epoch, after.members) == (known.spec, 3, (M0,))
    await store.close()
    await running


def test_ranks_come_and_go_with_their_keys() -> None:
    key = KEYS.rank(M0.rank, M0.incarnation)
    view = ClusterView().with_value(KEYS, key, pack(ToyRank(0).record()))
    assert [record.member for record in view.ranks.values()] == [M0]
    assert not view.without(key).ranks


def test_the_smallest_cache_of_the_members_bounds_a_session() -> None:
    view = ClusterView().with_value(
        KEYS, KEYS.rank(M0.rank, M0.incarnation), pack(ToyRank(0).record())
    )
    assert view.with_map(toy_map(1, [M0])).kv_tokens_min == 256 * 16


async def test_a_malformed_value_is_skipped_and_the_watch_goes_on() -> None:
    etcd = MemoryEtcd(FakeClock())
    store = etcd.client()
    seen: asyncio.Queue[ClusterView] = asyncio.Queue()
    watch = ClusterWatch(store=store, keys=KEYS, listeners=(seen.put_nowait,))
    running = asyncio.create_task(watch.run())
    await store.put(KEYS.map, b"rubbish")
    await store.put(KEYS.map, pack_map(toy_map(1, [M0])))
    async with asyncio.timeout(10):
        while True:
            view = await seen.get()
            if view.members == (M0,):
                break
    await store.close()
    await running


async def test_an_empty_instance_is_told_from_one_that_is_not_read_yet() -> None:
    store = MemoryEtcd(FakeClock()).client()
    seen: asyncio.Queue[ClusterView] = asyncio.Queue()
    running = asyncio.create_task(
        ClusterWatch(store=store, keys=KEYS, listeners=(seen.put_nowait,)).run()
    )
    async with asyncio.timeout(10):
        assert await seen.get() == ClusterView(is_read=True)
    await store.close()
    await running


def test_a_rank_of_another_release_is_left_to_other_gateways() -> None:
    stranger = replace(
        ToyRank(0).record(), release=Release(version="9.0", protocol=90, protocol_min=80)
    )
    with pytest.raises(OtherRelease, match=r"Starfish 9\.0"):
        ClusterView().with_value(KEYS, KEYS.rank(M0.rank, M0.incarnation), pack(stranger))
