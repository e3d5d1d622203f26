"""etcd ends with changes of which it has told and which it has not kept, as one of one node does
before 3.5.5 when its disk is full. Others get their revisions before anybody looks again."""

from __future__ import annotations

import asyncio

import pytest

from shared.revisions import Revisions
from shared.store import Put
from shared.watch_position import WatchPosition
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.schedules import ETCD, check_sessions, run_scenario
from tests.sim.sim_card import CardSizes

SIZES = pytest.mark.parametrize(
    "sizes", [SimClusterSizes(), SimClusterSizes(cards=CardSizes())], ids=["cpus", "cards"]
)
WITHIN_S = 60.0


async def lose_the_map_of_a_death(cluster: SimCluster) -> None:
    """All have seen the map without the dead rank, and etcd does not have it any more."""
    for first in range(8):
        cluster.send((first, *range(10)), 60)
    await asyncio.sleep(0.3)
    before = cluster.map_revision()
    cluster.kill_rank(1)

    def is_published() -> bool:
        return cluster.map_revision() != before

    await cluster.until(is_published, WITHIN_S)
    await asyncio.sleep(0.02)
    lost, hosts = cluster.map_revision(), [host for host in cluster.hosts() if host != ETCD]
    for host in hosts:
        cluster.sever(host, ETCD)
    cluster.etcd.lose_tail(lost - 1)
    for number in range(5):
        cluster.etcd.apply([Put(key=f"/somebody/else/{number}", value=b"")])
    assert cluster.etcd.revision > lost
    cluster.heal()


@SIZES
@pytest.mark.parametrize("seed", range(2))
def test_a_map_that_etcd_has_told_of_and_not_kept_is_published_again(
    seed: int, sizes: SimClusterSizes
) -> None:
    async def scenario(cluster: SimCluster) -> None:
        await lose_the_map_of_a_death(cluster)
        await cluster.until(cluster.all_ended, WITHIN_S)
        await cluster.until(cluster.all_live, WITHIN_S)
        check_sessions(cluster)

    run_scenario(scenario, seed, sizes)


def test_whoever_believes_in_revisions_that_etcd_has_lost_writes_nothing_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted bug: the test above would notice."""
    monkeypatch.setattr(Revisions, "_forget_lost", lambda self, snapshot: None)
    monkeypatch.setattr(WatchPosition, "_forget", lambda self: None)

    async def scenario(cluster: SimCluster) -> None:
        await lose_the_map_of_a_death(cluster)
        await asyncio.sleep(10.0)
        assert not cluster.all_live()

    run_scenario(scenario, 0, SimClusterSizes())
