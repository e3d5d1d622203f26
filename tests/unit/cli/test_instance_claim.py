"""One `starfish up` per instance, and what a dead one leaves behind."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import replace

import pytest

from cli.up.instance_claim import InstanceClaim, owner_record
from cli.up.leader_lease import revoke_leader_lease
from shared.errors import ConfigError
from shared.keys import Keys
from shared.records import LeaderRecord, OwnerRecord, pack_record, unpack_record
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd, MemoryStore

KEYS = Keys("claimed")


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd(FakeClock())


@pytest.fixture
def store(etcd: MemoryEtcd) -> MemoryStore:
    return etcd.client()


def owner(port: int) -> OwnerRecord:
    return owner_record(FakeClock(), f"http://127.0.0.1:{port}")


def claim(store: MemoryStore, record: OwnerRecord) -> InstanceClaim:
    return InstanceClaim(store, KEYS, record, warn=lambda _: None)


def ended_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


async def holder(store: MemoryStore) -> OwnerRecord | None:
    found = await store.get(KEYS.owner)
    return unpack_record(found.value, OwnerRecord) if found else None


async def test_a_second_run_is_told_who_has_the_instance(store: MemoryStore) -> None:
    first, second = owner(8000), owner(8001)
    await claim(store, first).take()
    with pytest.raises(ConfigError, match=rf"pid {first.pid} on .*:8000.*--instance"):
        await claim(store, second).take()
    assert await holder(store) == first


async def test_a_released_instance_is_free(store: MemoryStore) -> None:
    first, second = claim(store, owner(8000)), owner(8001)
    await first.take()
    await first.release()
    await claim(store, second).take()
    assert await holder(store) == second


async def test_a_run_whose_process_is_gone_has_nothing_any_more(store: MemoryStore) -> None:
    pid = ended_pid()
    dead = replace(owner(8000), pid=pid, started_ticks=1)
    await claim(store, dead).take()
    second = owner(8001)
    await claim(store, second).take()
    assert await holder(store) == second


async def test_nobody_is_thought_dead_on_another_host(store: MemoryStore) -> None:
    pid = ended_pid()
    await claim(store, replace(owner(8000), host="elsewhere", pid=pid)).take()
    with pytest.raises(ConfigError, match="on elsewhere"):
        await claim(store, owner(8001)).take()


async def test_a_claim_whose_reply_was_lost_is_ours(store: MemoryStore) -> None:
    mine = claim(store, owner(8000))
    await mine.take()
    await mine.take()


async def test_an_etcd_that_lost_its_data_gets_the_claim_again(
    etcd: MemoryEtcd, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.up.instance_claim._TTL_S", 0.03)
    monkeypatch.setattr("cli.up.instance_claim._RETRY_S", 0.01)
    record = owner(8000)
    mine = claim(store, record)
    await mine.take()
    async with mine.held(), asyncio.timeout(10):
        etcd.lose_data()
        while await holder(store) != record:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_only_the_leaders_own_lease_is_revoked(store: MemoryStore) -> None:
    leader = LeaderRecord(control_plane="a", pid=7, term=1, since=0.0, host=owner(1).host)
    lease_id = await store.grant_lease(30)
    await store.put(KEYS.leader, pack_record(leader), lease_id=lease_id)
    assert not await revoke_leader_lease(store, KEYS, 8)
    elsewhere = replace(leader, host="elsewhere")
    await store.put(KEYS.leader, pack_record(elsewhere), lease_id=lease_id)
    assert not await revoke_leader_lease(store, KEYS, 7)
    assert await store.get(KEYS.leader) is not None
    await store.put(KEYS.leader, pack_record(leader), lease_id=lease_id)
    assert await revoke_leader_lease(store, KEYS, 7)
    assert await store.get(KEYS.leader) is None
    assert not await revoke_leader_lease(store, KEYS, 7)


async def test_an_etcd_that_does_not_answer_is_left_alone(store: MemoryStore) -> None:
    store.reachable = False
    assert not await revoke_leader_lease(store, KEYS, 7)
