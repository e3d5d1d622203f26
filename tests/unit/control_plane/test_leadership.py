"""A standby whose watch is silent. On virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from control_plane.cluster_state import ClusterState
from control_plane.election import Election
from control_plane.leadership import Leadership, cannot_lead
from control_plane.state_applier import StateApplier
from shared.keys import Keys
from shared.records import LeaderRecord, pack_record, unpack_record
from shared.release import Release
from shared.store import Delete, Put
from tests.sim.sim_loop import SimLoop
from tests.sim.sim_rank import SimClock
from tests.support.control_port import PEER, RANK, record_of
from tests.support.gateway_harness import toy_map
from tests.support.memory_store import MemoryEtcd

KEYS = Keys("test")
TTL_S = 3.0
FUTURE = Release(version="9.0", protocol=90, protocol_min=80)
OTHER = LeaderRecord(control_plane="other", pid=2, term=1, since=0.0)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=SimLoop) as virtual:
        yield virtual


class Standby:
    """It has read etcd once, and nobody tells it of a change."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        clock = SimClock(loop)
        self.etcd = MemoryEtcd(clock)
        self.etcd.apply([Put(key=KEYS.leader, value=pack_record(OTHER))])
        cluster = StateApplier(KEYS)
        cluster.apply(self.etcd.snapshot(KEYS.root))
        self.leadership = Leadership(
            store=self.etcd.client(),
            cluster=cluster,
            election=Election(name="standby", ttl_s=TTL_S),
            clock=clock,
            name="standby",
            pid=1,
            host="h",
            ttl_s=TTL_S,
            on_change=lambda: None,
        )
        self.leadership.notify()
        self.cluster = cluster

    def leader(self) -> str | None:
        found = self.etcd.values.get(KEYS.leader)
        return unpack_record(found.value, LeaderRecord).control_plane if found else None


def test_a_deletion_that_the_watch_has_not_brought_is_found_with_the_next_renewal(
    runner: asyncio.Runner,
) -> None:
    async def scenario() -> None:
        standby = Standby()
        running = asyncio.ensure_future(standby.leadership.run())
        await asyncio.sleep(2 * TTL_S)
        assert standby.leader() == "other"
        standby.etcd.apply([Delete(key=KEYS.leader)])
        await asyncio.sleep(TTL_S / 2)
        assert standby.leader() == "standby"
        running.cancel()

    runner.run(scenario())


def register(standby: Standby, release: Release) -> None:
    """A rank that is not in a map."""
    record = replace(record_of(PEER, 1), release=release)
    standby.etcd.apply([Put(key=KEYS.rank(PEER.rank, PEER.incarnation), value=pack_record(record))])
    standby.cluster.apply(standby.etcd.snapshot(KEYS.root))


def test_a_control_plane_leaves_the_ranks_of_another_release_to_a_leader_of_theirs(
    runner: asyncio.Runner,
) -> None:
    async def scenario() -> None:
        standby = Standby()
        register(standby, FUTURE)
        running = asyncio.ensure_future(standby.leadership.run())
        await asyncio.sleep(0.1)
        standby.etcd.apply([Delete(key=KEYS.leader)])
        await asyncio.sleep(3 * TTL_S)
        assert standby.leader() is None
        reason = cannot_lead(standby.cluster.state)
        assert reason is not None
        assert str(FUTURE) in reason

        standby.etcd.apply([Delete(key=KEYS.rank(PEER.rank, PEER.incarnation))])
        standby.cluster.apply(standby.etcd.snapshot(KEYS.root))
        await asyncio.sleep(1.0)
        assert standby.leader() == "standby"
        running.cancel()

    runner.run(scenario())


def test_a_newcomer_of_another_release_keeps_nobody_from_leading() -> None:
    """It would be enough to start one rank to leave an instance without a leader."""
    state = ClusterState(
        keys=KEYS,
        records={RANK: record_of(RANK, 1)},
        refused={PEER: replace(record_of(PEER, 1), release=FUTURE)},
    )
    assert cannot_lead(state) is None
    of_members = replace(state, expert_map=toy_map(1, [RANK, PEER]))
    assert cannot_lead(of_members) is not None
