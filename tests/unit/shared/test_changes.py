"""Consumers of a watch see each change once, whatever snapshots come between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from shared.changes import Changes, changes
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd, MemoryStore


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd(FakeClock())


@pytest.fixture
def store(etcd: MemoryEtcd) -> MemoryStore:
    return etcd.client()


async def next_of(following: AsyncGenerator[Changes, None]) -> tuple[list[tuple[str, bool]], bool]:
    """The keys that came or went, and whether etcd was read whole."""
    item = await asyncio.wait_for(anext(following), 10)
    return [(event.key, event.value is not None) for event in item.events], item.synced


async def test_what_is_there_comes_first_and_at_once(store: MemoryStore) -> None:
    following = changes(store, "/t/")
    await store.put("/t/b", b"")
    await store.put("/t/a", b"")
    assert await next_of(following) == ([("/t/b", True), ("/t/a", True)], True)
    await store.delete("/t/b")
    assert await next_of(following) == ([("/t/b", False)], False)
    await following.aclose()


async def test_an_empty_prefix_is_synced_too(store: MemoryStore) -> None:
    following = changes(store, "/t/")
    assert await next_of(following) == ([], True)
    await following.aclose()


async def test_a_second_snapshot_brings_only_what_changed_meanwhile(
    etcd: MemoryEtcd, store: MemoryStore
) -> None:
    for key in ("/t/stays", "/t/goes"):
        await store.put(key, b"")
    following = changes(store, "/t/")
    await next_of(following)
    await store.delete("/t/goes")
    await store.put("/t/comes", b"")
    etcd.restart()
    etcd.compact(etcd.revision)
    assert await next_of(following) == ([("/t/comes", True), ("/t/goes", False)], True)
    await following.aclose()


async def test_lost_data_are_told_as_deletions(etcd: MemoryEtcd, store: MemoryStore) -> None:
    await store.put("/t/a", b"")
    following = changes(store, "/t/")
    await next_of(following)
    etcd.lose_data()
    assert await next_of(following) == ([("/t/a", False)], True)
    await following.aclose()
