"""Leaders that the ranks have lost, though etcd still holds their lease."""

from __future__ import annotations

import asyncio

import pytest

from control_plane.leadership import Leadership
from shared.records import LeaderRecord, unpack_record
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.schedules import check_sessions, run_scenario
from tests.sim.sim_card import CardSizes

AT_ONCE_S = 0.3
BEFORE_THE_LEASE_S = 1.5
"""Of virtual time. A lease lasts for two seconds from its last renewal."""
SIZES = pytest.mark.parametrize(
    "sizes", [SimClusterSizes(), SimClusterSizes(cards=CardSizes())], ids=["cpus", "cards"]
)


def leading(cluster: SimCluster) -> int | None:
    """The number of the control plane that holds the key."""
    found = cluster.etcd.values.get(cluster.keys.leader)
    if found is None:
        return None
    return int(unpack_record(found.value, LeaderRecord).control_plane.split("-")[1])


async def begin(cluster: SimCluster) -> int:
    """The instance serves for a while. Returns who leads."""
    for first in range(8):
        cluster.send((first, *range(10)), 60)
    await asyncio.sleep(2.0)
    first_leader = leading(cluster)
    assert first_leader is not None
    return first_leader


async def until_led_by_another(cluster: SimCluster, former: int, timeout_s: float) -> None:
    def is_led_by_another() -> bool:
        return leading(cluster) not in (None, former)

    await cluster.until(is_led_by_another, timeout_s)


@SIZES
@pytest.mark.parametrize("seed", range(2))
def test_a_leader_that_dies_with_a_rank_is_followed_at_once(
    seed: int, sizes: SimClusterSizes
) -> None:
    """As when a host is lost: nobody is left there to revoke leases."""

    async def scenario(cluster: SimCluster) -> None:
        dead = await begin(cluster)
        cluster.kill_control_plane(dead)
        cluster.kill_rank(1)
        await until_led_by_another(cluster, dead, AT_ONCE_S)
        await cluster.until(cluster.all_ended, 20.0)
        await cluster.until(cluster.all_live, 60.0)
        check_sessions(cluster)

    run_scenario(scenario, seed, sizes)


@pytest.mark.parametrize("seed", range(2))
def test_a_leader_that_reaches_etcd_but_no_rank_is_followed(seed: int) -> None:
    async def scenario(cluster: SimCluster) -> None:
        cut_off = await begin(cluster)
        for rank in range(cluster.sizes.num_ranks):
            cluster.sever(f"host-plane-{cut_off}", cluster.host_of_rank(rank))
        await until_led_by_another(cluster, cut_off, BEFORE_THE_LEASE_S)
        cluster.kill_rank(1)
        await cluster.until(cluster.all_ended, 20.0)
        check_sessions(cluster)

    run_scenario(scenario, seed, SimClusterSizes())


def test_a_leader_that_most_ranks_hear_stays() -> None:
    async def scenario(cluster: SimCluster) -> None:
        leader = await begin(cluster)
        cluster.sever(f"host-plane-{leader}", cluster.host_of_rank(2))
        await asyncio.sleep(10.0)
        assert leading(cluster) == leader

    run_scenario(scenario, 0, SimClusterSizes())


def test_without_doubts_its_lease_must_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the first test above would notice."""
    monkeypatch.setattr(Leadership, "look_at_doubts", lambda self: None)

    async def scenario(cluster: SimCluster) -> None:
        dead = await begin(cluster)
        cluster.kill_control_plane(dead)
        await asyncio.sleep(AT_ONCE_S)
        assert leading(cluster) == dead

    run_scenario(scenario, 0, SimClusterSizes())
