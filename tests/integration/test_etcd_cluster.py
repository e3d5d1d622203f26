"""The store over an etcd of three members, as people run it: members that are dead or hang, space
that is used up, and a snapshot that is restored."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.errors import StoreUnavailable
from shared.etcd_store import EtcdStore, connect_store
from shared.store import Snapshot, WatchEvent
from tests.support.etcd_cluster import NUM_MEMBERS, EtcdCluster, etcd_cluster

QUOTA_BYTES = 4 << 20


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[EtcdCluster]:
    async with etcd_cluster(tmp_path, "--quota-backend-bytes", str(QUOTA_BYTES)) as running:
        yield running


@pytest_asyncio.fixture
async def store(cluster: EtcdCluster) -> AsyncIterator[EtcdStore]:
    connected = await connect_store(cluster.options)
    yield connected
    await connected.close()


async def put(store: EtcdStore, key: str, value: bytes) -> None:
    """As services do it: again until it is done."""
    async with asyncio.timeout(30.0):
        while True:
            try:
                await store.put(key, value)
                return
            except StoreUnavailable:
                await asyncio.sleep(0.1)


async def value_of(watch: AsyncIterator[Snapshot | WatchEvent], key: str, value: bytes) -> None:
    """Until the watch has told this value."""
    async with asyncio.timeout(30.0):
        async for item in watch:
            if isinstance(item, Snapshot):
                if any((kv.key, kv.value) == (key, value) for kv in item.values):
                    return
            elif (item.key, item.value) == (key, value):
                return


async def test_each_member_of_three_may_die_for_a_while(
    cluster: EtcdCluster, store: EtcdStore
) -> None:
    """The leader among them: writes, watches and leases go on, and a process that starts meanwhile
    finds the others."""
    watch = store.watch("/starfish/t/")
    lease_id = await store.grant_lease(10.0)
    await store.put("/starfish/t/leased", b"", lease_id=lease_id)
    for member in range(NUM_MEMBERS):
        await cluster.kill(member)
        value = f"without {member}".encode()
        await put(store, "/starfish/t/key", value)
        await value_of(watch, "/starfish/t/key", value)
        newcomer = await connect_store(cluster.options, timeout_s=20.0)
        await newcomer.close()
        await _keep_alive(store, lease_id)
        await cluster.start(member)
        await cluster.until_healthy()
    assert await store.get("/starfish/t/leased") is not None


async def test_a_member_that_hangs_is_left(cluster: EtcdCluster, store: EtcdStore) -> None:
    """Its connections stay open, so that only the lack of an answer tells. Of as many watches as
    members, each is on another member."""
    watches = [store.watch(f"/starfish/t/{number}/") for number in range(NUM_MEMBERS)]
    for number, watch in enumerate(watches):
        await put(store, f"/starfish/t/{number}/key", b"before")
        await value_of(watch, f"/starfish/t/{number}/key", b"before")
    cluster.pause(0)
    for number, watch in enumerate(watches):
        await put(store, f"/starfish/t/{number}/key", b"after")
        await value_of(watch, f"/starfish/t/{number}/key", b"after")


async def fill(store: EtcdStore) -> None:
    for number in range(60):
        await store.put(f"/starfish/junk/{number}", os.urandom(500_000))


async def _keep_alive(store: EtcdStore, lease_id: int) -> None:
    async with asyncio.timeout(10.0):
        while True:
            try:
                await store.keep_alive(lease_id)
                return
            except StoreUnavailable:
                await asyncio.sleep(0.1)


async def test_a_full_etcd_says_so_keeps_leases_and_goes_on_when_there_is_space(
    cluster: EtcdCluster, store: EtcdStore
) -> None:
    assert (await store.health()).alarms == ()
    lease_id = await store.grant_lease(30.0)
    await store.put("/starfish/t/leased", b"", lease_id=lease_id)
    with pytest.raises(StoreUnavailable, match="space is used up"):
        await fill(store)
    health = await store.health()
    assert health.alarms == ("NOSPACE",)
    assert health.size_bytes > QUOTA_BYTES / 2
    assert await store.keep_alive(lease_id) > 0
    assert await store.get("/starfish/t/leased") is not None

    await cluster.etcdctl("del", "--prefix", "/starfish/junk/")
    found = await store.get("/starfish/t/leased")
    assert found is not None
    revision = (await store.get_prefix("/starfish/")).revision
    await cluster.etcdctl("compact", str(revision))
    await cluster.etcdctl("defrag")
    await cluster.etcdctl("alarm", "disarm")
    await put(store, "/starfish/t/key", b"again")
    assert (await store.health()).alarms == ()


async def test_a_watch_tells_what_a_restored_snapshot_took_back(
    cluster: EtcdCluster, store: EtcdStore, tmp_path: Path
) -> None:
    watch = store.watch("/starfish/t/")
    await put(store, "/starfish/t/key", b"old")
    snapshot = tmp_path / "snapshot.db"
    await cluster.save(snapshot)
    for value in (b"newer", b"newest"):
        await put(store, "/starfish/t/key", value)
    await value_of(watch, "/starfish/t/key", b"newest")
    for member in range(NUM_MEMBERS):
        await cluster.kill(member)
    await cluster.restore(snapshot)
    await value_of(watch, "/starfish/t/key", b"old")
    await put(store, "/starfish/t/key", b"after")
    await value_of(watch, "/starfish/t/key", b"after")
