"""Healing goes in small steps that never lose cover, ends, and then stays still."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from control_plane.placement import (
    HealStep,
    balance,
    compute_fault_tolerance,
    grow,
    heal,
    replica_counts,
    shrink,
)
from control_plane.placement.replica_counts import choose_counts, cover_floor
from control_plane.placement.topology import RankTopology, checked_loads, fill_quotas, presence
from shared.expert_map import ExpertMap, Placement
from shared.types import EMPTY_SLOT, NodeId, RankId
from tests.unit.control_plane.placement.clusters import Cluster, bench_cluster, bounded, clusters

STEPS_MOST = 500


@st.composite
def wounds(draw: st.DrawFn) -> tuple[Cluster, ExpertMap]:
    """A map after some deaths and, at times, a rejoin, under loads that have changed since."""
    cluster = draw(clusters(fits_all_experts=True))
    dead = draw(st.sets(st.sampled_from(cluster.ranks), max_size=len(cluster.ranks) - 1))
    alive = [r for r in cluster.ranks if r not in dead]
    placement = shrink(cluster.map_of(cluster.place().placement), dead, cluster.loads).refilled
    expert_map = cluster.map_of(placement, alive)
    if dead and draw(st.booleans()):
        grown = grow(
            expert_map, sorted(dead), cluster.nodes, cluster.slots, redundant=cluster.redundant
        )
        expert_map = cluster.map_of(grown.placement)
    loads = np.roll(cluster.loads, draw(st.integers(0, cluster.num_experts - 1)), axis=1)
    changed = Cluster(
        loads=loads, nodes=cluster.nodes, slots=cluster.slots, redundant=cluster.redundant
    )
    return changed, expert_map


def steps(
    cluster: Cluster, expert_map: ExpertMap, budget: int = 3, bytes_per_expert: int = 10
) -> list[HealStep]:
    found = heal(
        expert_map,
        cluster.loads,
        cluster.nodes,
        budget_bytes=budget * 10,
        bytes_per_expert=bytes_per_expert,
        redundant=cluster.redundant,
    )
    result = list(itertools.islice(found, STEPS_MOST + 1))
    assert len(result) <= STEPS_MOST, "healing does not end"
    return result


def ranks_of(expert_map: ExpertMap) -> list[RankId]:
    return [m.rank for m in expert_map.members]


def covered(placement: Placement, num_experts: int) -> np.ndarray:
    return replica_counts(placement, num_experts) > 0


@bounded
@given(wounds())
def test_no_map_of_any_step_loses_cover(case: tuple[Cluster, ExpertMap]) -> None:
    cluster, expert_map = case
    has = covered(expert_map.placement, cluster.num_experts)
    for step in steps(cluster, expert_map):
        assert covered(step.emptied, cluster.num_experts)[has].all()
        has = covered(step.placement, cluster.num_experts) | has
        assert covered(step.placement, cluster.num_experts)[has].all()


@bounded
@given(wounds(), st.integers(1, 5))
def test_each_step_keeps_to_its_budget_and_says_all_that_it_changes(
    case: tuple[Cluster, ExpertMap], budget: int
) -> None:
    cluster, expert_map = case
    before = expert_map.placement
    for step in steps(cluster, expert_map, budget):
        assert step.bytes == 10 * len(step.slot_fills) <= 10 * budget
        filled = step.emptied.copy()
        for layer, rank, slot, expert in step.slot_fills:
            assert filled[layer, rank, slot] == EMPTY_SLOT
            filled[layer, rank, slot] = expert
        assert (filled == step.placement).all()
        emptied = step.emptied != before
        assert (step.emptied[emptied] == EMPTY_SLOT).all()
        assert (step.placement != before).any()
        before = step.placement


@bounded
@given(wounds())
def test_only_members_slots_are_used_and_no_rank_gets_an_expert_twice(
    case: tuple[Cluster, ExpertMap],
) -> None:
    cluster, expert_map = case
    members = set(ranks_of(expert_map))
    for step in steps(cluster, expert_map):
        for load in step.slot_fills:
            assert load.rank in members
            row = step.placement[load.layer, load.rank]
            assert (row == load.expert).sum() == 1


@bounded
@given(wounds())
def test_once_healed_nothing_is_left_to_do(case: tuple[Cluster, ExpertMap]) -> None:
    cluster, expert_map = case
    for step in steps(cluster, expert_map):
        expert_map = cluster.map_of(step.placement, ranks_of(expert_map))
    assert steps(cluster, expert_map) == []


@bounded
@given(wounds())
def test_asking_again_after_every_step_ends_too(case: tuple[Cluster, ExpertMap]) -> None:
    cluster, expert_map = case
    for _ in range(STEPS_MOST):
        found = steps(cluster, expert_map)
        if not found:
            return
        expert_map = cluster.map_of(found[0].placement, ranks_of(expert_map))
    pytest.fail("healing goes in circles")


@bounded
@given(wounds())
def test_replicas_are_given_up_only_where_hot_experts_need_their_slots(
    case: tuple[Cluster, ExpertMap],
) -> None:
    cluster, expert_map = case
    found = steps(cluster, expert_map)
    if not found:
        return
    topology = RankTopology.of_map(expert_map, cluster.nodes)
    quotas = fill_quotas(topology, cluster.num_experts, cluster.redundant)
    least = cover_floor(cluster.num_experts, quotas, 0)
    wanted = choose_counts(checked_loads(cluster.loads, *cluster.loads.shape), topology, quotas, 0)
    before, after = (
        np.maximum(least - (presence(p, cluster.num_experts) > 0).sum(axis=2), 0).sum(axis=1)
        for p in (expert_map.placement, found[-1].placement)
    )
    allowed = np.maximum(least - wanted, 0).sum(axis=1)
    assert (after <= np.maximum(before, allowed)).all()


UNKNOWN_LOADS = Cluster(
    loads=np.zeros((1, 3)),
    nodes={RankId(r): NodeId(f"node{r // 2}") for r in range(4)},
    slots={RankId(r): 2 for r in range(4)},
    redundant=None,
)


@bounded
@given(clusters(fits_all_experts=True, even=True))
@example(UNKNOWN_LOADS)  # which count as even ones
def test_a_fresh_placement_that_is_balanced_needs_no_healing(cluster: Cluster) -> None:
    placement = cluster.place().placement
    loads = checked_loads(cluster.loads, *cluster.loads.shape)
    if balance(placement, loads, cluster.ranks).max() <= 1.05:
        assert steps(cluster, cluster.map_of(placement)) == []


def test_after_a_death_spare_slots_bring_back_every_second_copy() -> None:
    cluster = Cluster(**{**_fields(bench_cluster(slots=20)), "redundant": 64})
    expert_map = cluster.map_of(cluster.place().placement)
    alive = [r for r in cluster.ranks if r != 2]
    wounded = cluster.map_of(shrink(expert_map, {RankId(2)}, cluster.loads).refilled, alive)
    assert compute_fault_tolerance(wounded, cluster.nodes).rank_failures == 0
    found = steps(cluster, wounded, budget=16)
    healed = cluster.map_of(found[-1].placement, alive)
    assert compute_fault_tolerance(healed, cluster.nodes).rank_failures == 1
    assert compute_fault_tolerance(healed, cluster.nodes).node_failures == 1
    assert balance(healed.placement, cluster.loads, alive).max() < 1.15


def test_changed_loads_are_balanced_again_without_giving_up_a_second_copy() -> None:
    cluster = bench_cluster()
    expert_map = cluster.map_of(cluster.place().placement)
    changed = Cluster(**{**_fields(cluster), "loads": bench_cluster(seed=9).loads})
    before = balance(expert_map.placement, changed.loads, cluster.ranks)
    found = steps(changed, expert_map, budget=16)
    healed = changed.map_of(found[-1].placement)
    after = balance(healed.placement, changed.loads, cluster.ranks)
    assert after.max() < 1.12 < before.max()
    assert compute_fault_tolerance(healed, changed.nodes).rank_failures == 1


def test_cover_comes_before_balance() -> None:
    cluster = bench_cluster(layers=2, experts=4, ranks=2, nodes=1, slots=4)
    placement = np.full((2, 2, 4), EMPTY_SLOT, dtype=np.int16)
    placement[0, 0] = [0, 1, 2, EMPTY_SLOT]  # expert 3 has no slot
    placement[1, 0] = [0, 1, 2, 3]  # all on one rank: no balance at all
    first = steps(cluster, cluster.map_of(placement), budget=1)[0]
    assert first.reason == "cover"
    assert [(r.layer, r.expert) for r in first.slot_fills] == [(0, 3)]


def _fields(cluster: Cluster) -> dict[str, object]:
    return {
        "loads": cluster.loads,
        "nodes": cluster.nodes,
        "slots": cluster.slots,
        "redundant": cluster.redundant,
    }


def test_the_expert_of_a_dense_model_weighs_nothing_and_is_healed_all_the_same() -> None:
    """Of three ranks the third has come back with an empty slot."""
    ranks = [RankId(rank) for rank in range(3)]
    dense = Cluster(
        loads=np.ones((1, 1)),
        nodes={rank: NodeId("one") for rank in ranks},
        slots=dict.fromkeys(ranks, 1),
        redundant=None,
    )
    expert_map = dense.map_of(np.array([[[0], [0], [EMPTY_SLOT]]], dtype=np.int16))
    (step,) = steps(dense, expert_map, bytes_per_expert=0)
    assert step.placement.tolist() == [[[0], [0], [0]]]
