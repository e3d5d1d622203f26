"""A death while etcd cannot be reached: the leader gives the map without the dead to the ranks
itself, and etcd has it later."""

from __future__ import annotations

import asyncio

import pytest

from control_plane.prober import Prober
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.schedules import ETCD, LEASE_TTL_S, check_sessions, run_scenario
from tests.sim.sim_card import CardSizes

SOON_S = 5.0
"""Of virtual time, without etcd. A verdict of the control plane's own takes a part of a second."""
SIZES = pytest.mark.parametrize(
    "sizes", [SimClusterSizes(), SimClusterSizes(cards=CardSizes())], ids=["cpus", "cards"]
)


def take_etcd_away(cluster: SimCluster) -> None:
    for host in cluster.hosts():
        if host != ETCD:
            cluster.sever(host, ETCD)


async def kill_without_etcd(cluster: SimCluster, away_for_s: float) -> None:
    """Kills a rank that serves, etcd being away for so long already."""
    take_etcd_away(cluster)
    await asyncio.sleep(away_for_s)
    for first in range(8):
        cluster.send((first, *range(10)), 40)
    await asyncio.sleep(0.05)
    cluster.kill_rank(1)


@SIZES
@pytest.mark.parametrize("survivors", [0, 1])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_left_after_an_offered_map_forms_again(
    seed: int, survivors: int, sizes: SimClusterSizes
) -> None:
    """etcd never had the map that the rest runs, or ran."""

    async def scenario(cluster: SimCluster) -> None:
        await kill_without_etcd(cluster, 0.1)
        await asyncio.sleep(1.0)
        for rank in (0, 2, 3)[survivors:]:
            cluster.kill_rank(rank)
        await asyncio.sleep(1.0)
        cluster.heal()
        await cluster.until(cluster.all_live, 60.0)
        cluster.send((1, 2, 3), 20)
        await cluster.until(cluster.all_ended, 60.0)

    run_scenario(scenario, seed, sizes)


async def kill_with_hosts_cut_off_from_etcd(cluster: SimCluster) -> None:
    """Kills a rank that serves, while two others are cut off from etcd. The control plane and
    everybody else reach it."""
    for first in range(8):
        cluster.send((first, *range(10)), 40)
    await asyncio.sleep(0.05)
    for rank in (0, 2):
        cluster.sever(f"host-{rank}", ETCD)
    cluster.kill_rank(1)


@SIZES
@pytest.mark.parametrize("away_for_s", [0.1, 3 * LEASE_TTL_S], ids=["just_now", "for_long"])
@pytest.mark.parametrize("seed", range(3))
def test_a_death_without_etcd_stops_nobody(
    seed: int, away_for_s: float, sizes: SimClusterSizes
) -> None:
    async def scenario(cluster: SimCluster) -> None:
        await kill_without_etcd(cluster, away_for_s)
        await cluster.until(cluster.all_ended, SOON_S)
        cluster.heal()
        await cluster.until(cluster.all_live, 60.0)
        cluster.send((1, 2, 3), 20)
        await cluster.until(cluster.all_ended, 20.0)
        check_sessions(cluster)

    run_scenario(scenario, seed, sizes)


@SIZES
@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_are_cut_off_from_etcd_alone_hear_of_a_written_map(
    seed: int, sizes: SimClusterSizes
) -> None:
    async def scenario(cluster: SimCluster) -> None:
        await kill_with_hosts_cut_off_from_etcd(cluster)
        await cluster.until(cluster.all_ended, SOON_S)
        cluster.heal()
        await cluster.until(cluster.all_live, 60.0)
        check_sessions(cluster)

    run_scenario(scenario, seed, sizes)


def test_without_offers_ranks_that_are_cut_off_from_etcd_alone_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted bug: the test above would notice."""
    monkeypatch.setattr(Prober, "offer_map", lambda self, expert_map: None)

    async def scenario(cluster: SimCluster) -> None:
        await kill_with_hosts_cut_off_from_etcd(cluster)
        await asyncio.sleep(SOON_S)
        assert not cluster.all_ended()

    run_scenario(scenario, 0, SimClusterSizes())


def test_without_offers_all_wait_for_etcd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the tests above would notice."""
    monkeypatch.setattr(Prober, "offer_map", lambda self, expert_map: None)

    async def scenario(cluster: SimCluster) -> None:
        await kill_without_etcd(cluster, 0.1)
        await asyncio.sleep(SOON_S)
        assert not cluster.all_ended()
        cluster.heal()
        await cluster.until(cluster.all_ended, 60.0)
        check_sessions(cluster)

    run_scenario(scenario, 0, SimClusterSizes())
