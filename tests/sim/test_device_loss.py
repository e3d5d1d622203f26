"""A process that can use its card no more ends, so that another takes its place, whatever it was
doing when its card failed. What a peer's memory does is not held against the own card."""

from __future__ import annotations

import asyncio

import pytest

from shared.exit_codes import EXIT_DEVICE_LOST
from shared.types import Incarnation, RankId
from tests.sim.cluster import SimCluster, SimClusterSizes
from tests.sim.schedules import Outcome, check_sessions, run_world
from tests.sim.sim_card import CardSizes

SIZES = SimClusterSizes(cards=CardSizes(ranks_per_card=4, map_s=(0.1, 0.2)))


async def fail_while_starting(cluster: SimCluster) -> Outcome:
    """The card of a successor fails after it has registered and before it has met all others: no
    graph of it will ever show it."""
    await cluster.start()
    cluster.send((1, *range(10)), 40)
    cluster.kill_rank(1)

    record = cluster.keys.rank(RankId(1), Incarnation(2))
    await cluster.until(lambda: record in cluster.etcd.values, 10.0)
    process = cluster.process_of(1)
    assert process is not None
    process.device_failed = True
    await cluster.until(lambda: process.dead, 10.0)
    assert process.exit_code == EXIT_DEVICE_LOST
    await cluster.until(cluster.all_live, 20.0)
    await cluster.until(cluster.all_ended, 20.0)
    check_sessions(cluster)
    return Outcome(cluster.seed, (), 0, 0, 0)


@pytest.mark.parametrize("seed", range(2))
def test_a_starting_rank_whose_card_fails_is_replaced(seed: int) -> None:
    run_world(seed, SIZES, fail_while_starting)


def test_a_rank_that_blames_its_peers_for_its_own_card_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 9: it lives on, and links to nobody."""
    monkeypatch.setattr("gpu_worker.cuda.ep.rank_mask.RankMask.check_device", lambda _: None)
    with pytest.raises(TimeoutError):
        run_world(0, SIZES, fail_while_starting)


async def lose_peers_memory(cluster: SimCluster) -> Outcome:
    """A successor dies while others meet it: what cannot be mapped is its memory."""
    await cluster.start()
    incarnations = {r: a.member.incarnation for r, a in cluster.agents.items() if a.member}
    for _ in range(3):
        cluster.kill_rank(1)
        await asyncio.sleep(0.35)
    await cluster.until(cluster.all_live, 30.0)
    for rank, agent in cluster.agents.items():
        assert agent.member is not None
        assert rank == 1 or agent.member.incarnation == incarnations[rank]
    return Outcome(cluster.seed, (), 0, 0, 0)


def test_a_peer_that_dies_while_it_is_met_costs_nobody_else() -> None:
    run_world(3, SIZES, lose_peers_memory)
