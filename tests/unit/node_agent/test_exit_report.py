"""An exit reaches etcd: through the end of the lease, and through the agent's report."""

from __future__ import annotations

import asyncio

from node_agent.exit_report import ExitReporter
from node_agent.rank_supervisor import RunningRank
from shared.keys import Keys
from shared.records import Suspicion, unpack_record
from shared.types import Incarnation, Member, NodeId, RankId, SuspicionReason
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd

KEYS = Keys("t")


def running_rank(incarnation: int, lease_id: int) -> RunningRank:
    member = Member(rank=RankId(1), incarnation=Incarnation(incarnation))
    return RunningRank(member=member, lease_id=lease_id, pid=1)


async def suspicions(etcd: MemoryEtcd) -> list[Suspicion]:
    found = await etcd.client().get_prefix(KEYS.suspicions)
    return [unpack_record(kv.value, Suspicion) for kv in found.values]


async def test_the_record_goes_and_the_exit_report_stays() -> None:
    etcd = MemoryEtcd(FakeClock())
    store = etcd.client()
    agent, rank = await store.grant_lease(5), await store.grant_lease(5)
    await store.put(KEYS.rank(RankId(1), Incarnation(3)), b"record", lease_id=rank)
    exit_reporter = ExitReporter(store, KEYS, NodeId("n"), FakeClock(now=50.0))
    await exit_reporter.revoke_and_report(running_rank(3, rank), -9, agent_lease_id=lambda: agent)
    assert (await store.get_prefix(KEYS.ranks)).values == ()
    (said,) = await suspicions(etcd)
    assert (said.rank, said.incarnation, said.reason) == (1, 3, SuspicionReason.EXIT)
    assert (said.raised_at, said.by, said.detail) == (50.0, "agent:n", "killed by SIGKILL")


async def test_only_the_last_exit_of_a_rank_is_reported() -> None:
    etcd = MemoryEtcd(FakeClock())
    store = etcd.client()
    agent = await store.grant_lease(5)
    exit_reporter = ExitReporter(store, KEYS, NodeId("n"), FakeClock())
    for incarnation in (3, 4, 5):
        lease = await store.grant_lease(5)
        await exit_reporter.revoke_and_report(
            running_rank(incarnation, lease), 0, agent_lease_id=lambda: agent
        )
    assert [s.incarnation for s in await suspicions(etcd)] == [5]


async def test_with_etcd_away_the_death_is_told_later() -> None:
    etcd = MemoryEtcd(FakeClock())
    store, other = etcd.client(), etcd.client()
    agent, rank = await store.grant_lease(5), await store.grant_lease(5)
    await store.put(KEYS.rank(RankId(1), Incarnation(3)), b"record", lease_id=rank)
    exit_reporter = ExitReporter(store, KEYS, NodeId("n"), FakeClock())
    store.reachable = False
    publishing = asyncio.ensure_future(
        exit_reporter.revoke_and_report(running_rank(3, rank), None, agent_lease_id=lambda: agent)
    )
    for _ in range(5):
        await asyncio.sleep(0)
    assert len((await other.get_prefix(KEYS.ranks)).values) == 1
    store.reachable = True
    await publishing
    assert (await other.get_prefix(KEYS.ranks)).values == ()
    assert len(await suspicions(etcd)) == 1
