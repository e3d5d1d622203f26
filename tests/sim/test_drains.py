"""A drain, step by step, on CPUs and on cards: nobody is declared dead, no stream differs, and the
process stays or goes as was asked."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from control_plane.desired_changes import DrainRanks, Replace, RestartRanks, Undrain
from shared.types import NodeId, RankId, SuspicionReason
from tests.sim.changes import Changes
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.invariants import InvariantChecker
from tests.sim.schedules import MapChecker, Outcome, check_sessions, run_world
from tests.sim.sim_card import CardSizes

WAIT_S = 20.0
ON_CPUS = SimClusterSizes(num_spare_hosts=1)
ON_CARDS = SimClusterSizes(num_spare_hosts=1, cards=CardSizes(graph_timeout_s=2.0))

pytestmark = pytest.mark.parametrize("sizes", [ON_CPUS, ON_CARDS], ids=["cpus", "cards"])
Scenario = Callable[[SimCluster, Changes], Coroutine[Any, Any, None]]


def run(scenario: Scenario, sizes: SimClusterSizes) -> None:
    async def whole(cluster: SimCluster) -> Outcome:
        MapChecker(cluster)
        checker = InvariantChecker(cluster)
        await cluster.start()
        for first in range(8):
            cluster.send((first, *range(10)), 60)
        await scenario(cluster, Changes(cluster, 0.0))
        await cluster.until(cluster.all_ended, WAIT_S)
        check_sessions(cluster)
        assert set(checker.causes) == {SuspicionReason.DRAINED}
        return Outcome(cluster.seed, (), 0, 0, 0)

    run_world(7, sizes, whole)


def ranks(*numbers: int) -> tuple[RankId, ...]:
    return tuple(RankId(number) for number in numbers)


def serves_as(cluster: SimCluster, *numbers: int) -> Callable[[], bool]:
    def serves() -> bool:
        return {m.rank for m in cluster.gateway.view.members} == set(numbers)

    return serves


def test_a_drained_rank_stays_and_is_taken_back(sizes: SimClusterSizes) -> None:
    async def scenario(cluster: SimCluster, changes: Changes) -> None:
        process = cluster.process_of(1)
        await changes.ask(DrainRanks(ranks=ranks(1), grace_s=0.2))
        await cluster.until(serves_as(cluster, 0, 2, 3), WAIT_S)
        await changes.ask(Undrain(ranks=ranks(1)))
        await cluster.until(serves_as(cluster, 0, 1, 2, 3), WAIT_S)
        assert cluster.process_of(1) is process

    run(scenario, sizes)


def test_a_rank_moves_to_another_host(sizes: SimClusterSizes) -> None:
    async def scenario(cluster: SimCluster, changes: Changes) -> None:
        await changes.ask(Replace(rank=RankId(2), node=NodeId("host-4"), grace_s=0.2))
        await cluster.until(serves_as(cluster, 0, 1, 3), WAIT_S)
        await cluster.until(serves_as(cluster, 0, 1, 2, 3), WAIT_S)
        assert cluster.process_of(2) is None
        assert cluster.process_of(4) is not None
        assert changes.desired.drains == ()

    run(scenario, sizes)


def test_a_restart_gives_each_rank_a_new_process(sizes: SimClusterSizes) -> None:
    async def scenario(cluster: SimCluster, changes: Changes) -> None:
        before = {rank: cluster.process_of(rank) for rank in range(4)}
        await changes.ask(RestartRanks(ranks=ranks(0, 3), grace_s=0.2))
        await cluster.until(lambda: changes.desired.restart is None, 2 * WAIT_S)
        await cluster.until(serves_as(cluster, 0, 1, 2, 3), WAIT_S)
        same = {rank for rank, process in before.items() if cluster.process_of(rank) is process}
        assert same == {1, 2}

    run(scenario, sizes)


def test_a_rank_that_is_told_to_end_is_drained_first(sizes: SimClusterSizes) -> None:
    async def scenario(cluster: SimCluster, changes: Changes) -> None:
        process = cluster.process_of(1)
        assert process is not None
        member = cluster.agents[1].member
        assert member is not None
        cluster.run_in(process, lambda: cluster.ranks[member].leave(60.0))
        await cluster.until(serves_as(cluster, 0, 2, 3), WAIT_S)
        await cluster.until(serves_as(cluster, 0, 1, 2, 3), WAIT_S)
        assert process.dead
        assert cluster.process_of(1) is not process

    run(scenario, sizes)
