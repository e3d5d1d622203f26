"""A verdict ends an incarnation, not its process: who wakes up fenced comes back in place, and what
it left behind changes nobody's tokens."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpu_worker import rejoin
from gpu_worker.rank import Rank
from shared.types import Incarnation, RankId
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.schedules import check_sessions, run_scenario
from tests.sim.sim_card import CardSizes
from tests.sim.sim_loop import SimProcess, resume

STOPPED_S = 1.0
BACK_S = 2.0  # of virtual time, in which a load or a first contact may take 0.3 s


ON_CPUS = SimClusterSizes()
ON_CARDS = SimClusterSizes(cards=CardSizes(graph_timeout_s=2.0))
ON_ONE_CARD = SimClusterSizes(cards=CardSizes(ranks_per_card=4, time_sliced=True, step_s=0.02))
SIZES = pytest.mark.parametrize(
    "sizes", [ON_CPUS, ON_CARDS, ON_ONE_CARD], ids=["cpus", "cards", "one_card"]
)


async def stop_with_streams(cluster: SimCluster, rank: int) -> SimProcess:
    """Stops a rank in the middle of streams, until its verdict is there and a little longer."""
    process = cluster.process_of(rank)
    assert process is not None
    for first in range(8):
        cluster.send((first, *range(10)), 40)
    await asyncio.sleep(0.05)
    cluster.agents[rank].stop_rank()
    await asyncio.sleep(STOPPED_S)
    assert cluster.agents[rank].member not in cluster.gateway.view.members
    return process


@SIZES
@pytest.mark.parametrize("seed", range(5))
def test_a_stopped_rank_is_back_in_place(seed: int, sizes: SimClusterSizes) -> None:
    async def scenario(cluster: SimCluster) -> None:
        process = await stop_with_streams(cluster, 1)
        resume(process, cluster.loop)
        await asyncio.sleep(0.0)
        await cluster.until(lambda: _incarnation_in_map(cluster, 1) == 2, BACK_S)
        assert cluster.process_of(1) is process
        cluster.send((1, 2, 3), 20)
        await cluster.until(cluster.all_ended, 20.0)
        check_sessions(cluster)

    run_scenario(scenario, seed, sizes)


@SIZES
def test_two_ranks_that_were_stopped_are_back_in_place(sizes: SimClusterSizes) -> None:
    """Each has to meet the other's next incarnation."""

    async def scenario(cluster: SimCluster) -> None:
        second = cluster.process_of(2)
        assert second is not None
        cluster.agents[2].stop_rank()
        first = await stop_with_streams(cluster, 1)
        for process in (first, second):
            resume(process, cluster.loop)
        await cluster.until(lambda: _incarnation_in_map(cluster, 1) == 2, BACK_S)
        await cluster.until(lambda: _incarnation_in_map(cluster, 2) == 2, BACK_S)
        assert [cluster.process_of(1), cluster.process_of(2)] == [first, second]
        await cluster.until(cluster.all_ended, 20.0)
        check_sessions(cluster)

    run_scenario(scenario, 4, replace(sizes, slots_per_rank=6, redundant_experts=12))


def test_a_rank_whose_card_fails_while_it_is_fenced_is_replaced() -> None:
    async def scenario(cluster: SimCluster) -> None:
        process = await stop_with_streams(cluster, 1)
        process.device_failed = True
        resume(process, cluster.loop)
        await cluster.until(cluster.all_live, 20.0)
        assert cluster.process_of(1) is not process
        await cluster.until(cluster.all_ended, 20.0)
        check_sessions(cluster)

    run_scenario(scenario, 5, ON_CARDS)


def test_a_rank_that_dies_in_its_second_incarnation_is_noticed_at_once() -> None:
    """Its agent knows the lease that the process took itself."""

    async def scenario(cluster: SimCluster) -> None:
        resume(await stop_with_streams(cluster, 1), cluster.loop)
        await cluster.until(lambda: _incarnation_in_map(cluster, 1) == 2, BACK_S)
        record = cluster.keys.rank(RankId(1), Incarnation(2))
        assert record in cluster.etcd.values
        cluster.kill_rank(1)
        await cluster.until(lambda: record not in cluster.etcd.values, 0.2)
        await cluster.until(lambda: _incarnation_in_map(cluster, 1) is None, 0.2)
        await cluster.until(cluster.all_live, 20.0)
        await cluster.until(cluster.all_ended, 20.0)
        check_sessions(cluster)

    run_scenario(scenario, 1, ON_CPUS)


def test_a_process_whose_threads_do_not_end_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: Rank) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Rank, "wait_for_threads", never)

    async def scenario(cluster: SimCluster) -> None:
        process = await stop_with_streams(cluster, 1)
        resume(process, cluster.loop)
        await cluster.until(cluster.all_live, 20.0)
        assert cluster.process_of(1) is not process
        await cluster.until(cluster.all_ended, 20.0)
        check_sessions(cluster)

    run_scenario(scenario, 2, ON_CPUS)


def test_a_process_that_is_fenced_again_and_again_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rejoin, "REJOINS_MAX", 1)

    async def scenario(cluster: SimCluster) -> None:
        process = await stop_with_streams(cluster, 1)
        resume(process, cluster.loop)
        await cluster.until(cluster.all_live, 20.0)
        assert cluster.process_of(1) is process
        resume(await stop_with_streams(cluster, 1), cluster.loop)
        await cluster.until(lambda: process.dead, 5.0)
        await cluster.until(cluster.all_live, 20.0)

    run_scenario(scenario, 3, ON_CPUS)


def _incarnation_in_map(cluster: SimCluster, rank: int) -> Incarnation | None:
    members = cluster.gateway.view.members
    return next((m.incarnation for m in members if m.rank == rank), None)
