"""A fresh placement covers, spreads, balances and repeats itself, on clusters of every shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.placement import balance, compute_fault_tolerance, place, replica_counts
from shared.types import ABSENT_SLOT, EMPTY_SLOT, NodeId, RankId
from tests.unit.control_plane.placement.clusters import (
    Cluster,
    bench_cluster,
    bounded,
    clusters,
    holders,
)


@bounded
@given(clusters())
def test_only_existing_slots_hold_experts_and_no_rank_holds_one_twice(cluster: Cluster) -> None:
    placement = cluster.place().placement
    for rank, count in cluster.slots.items():
        assert (placement[:, rank, :count] >= EMPTY_SLOT).all()
        assert (placement[:, rank, count:] == ABSENT_SLOT).all()
        for row in placement[:, rank]:
            held = row[row >= 0]
            assert len(set(held.tolist())) == len(held)


@bounded
@given(clusters())
def test_every_expert_is_in_a_slot_or_named_as_left_out(cluster: Cluster) -> None:
    plan = cluster.place()
    uncovered = set(cluster.map_of(plan.placement).uncovered())
    assert uncovered == set(plan.unplaced_experts)


@bounded
@given(clusters(fits_all_experts=True))
def test_with_slots_for_all_experts_none_is_left_out(cluster: Cluster) -> None:
    assert cluster.place().unplaced_experts == ()


@bounded
@given(clusters())
def test_too_few_slots_leave_out_the_coldest_and_waste_no_slot(cluster: Cluster) -> None:
    plan = cluster.place()
    for layer, loads in enumerate(cluster.loads):
        outside = [p.expert for p in plan.unplaced_experts if p.layer == layer]
        inside = sorted(set(range(cluster.num_experts)) - set(outside))
        if outside:
            assert len(inside) == sum(min(s, cluster.num_experts) for s in cluster.slots.values())
            assert not inside or loads[outside].max() <= loads[inside].min() or not loads.any()


@bounded
@given(clusters(fits_all_experts=True))
def test_redundant_says_how_many_slots_are_filled_and_the_rest_is_spare(cluster: Cluster) -> None:
    placement = cluster.place().placement
    room = sum(min(s, cluster.num_experts) for s in cluster.slots.values())
    wanted = cluster.num_experts + (room if cluster.redundant is None else cluster.redundant)
    filled = (placement >= 0).sum(axis=(1, 2))
    assert (filled <= min(room, wanted)).all()
    # Very uneven ranks can leave a slot without an expert that its rank lacks; even ones never.
    if len(set(cluster.slots.values())) == 1:
        assert (filled == min(room, wanted)).all()


@bounded
@given(clusters(fits_all_experts=True, even=True))
def test_on_equal_nodes_replicas_share_a_node_only_when_each_node_has_one(cluster: Cluster) -> None:
    placement = cluster.place().placement
    num_nodes = len(set(cluster.nodes.values()))
    counts = replica_counts(placement, cluster.num_experts)
    for (layer, expert), count in np.ndenumerate(counts):
        on = {cluster.nodes[RankId(r)] for r in holders(placement, layer, expert)}
        assert len(on) == min(int(count), num_nodes)


@bounded
@given(clusters(fits_all_experts=True, even=True), st.integers(1, 3))
def test_a_guarantee_holds_as_far_as_the_slots_go(cluster: Cluster, survive: int) -> None:
    placement = cluster.place(survive).placement
    filled = int((placement[0] >= 0).sum())
    promised = min(survive, len(cluster.ranks) - 1, filled // cluster.num_experts - 1)
    assert (
        compute_fault_tolerance(cluster.map_of(placement), cluster.nodes).rank_failures >= promised
    )


@bounded
@given(clusters())
def test_the_same_input_gives_the_same_placement(cluster: Cluster) -> None:
    assert (cluster.place().placement == cluster.place().placement).all()


def test_a_full_second_copy_survives_any_rank_and_any_node_and_still_balances() -> None:
    cluster = bench_cluster()
    placement = cluster.place().placement
    tolerance = compute_fault_tolerance(cluster.map_of(placement), cluster.nodes)
    assert (tolerance.rank_failures, tolerance.node_failures) == (1, 1)
    assert balance(placement, cluster.loads, cluster.ranks).max() < 1.02


def test_an_expert_too_hot_for_two_ranks_gets_the_replicas_that_balance_needs() -> None:
    cluster = bench_cluster(layers=1)
    loads = np.ones_like(cluster.loads)
    loads[0, 5] = 40.0  # of 103: two replicas would load a rank 1.55 times the mean
    cluster = dataclasses.replace(cluster, loads=loads)
    placement = cluster.place().placement
    counts = replica_counts(placement, cluster.num_experts)[0]
    assert counts[5] > 3
    assert balance(placement, loads, cluster.ranks).max() < 1.05
    assert (counts >= 2).sum() > 0.8 * cluster.num_experts


def test_survive_keeps_every_second_copy_even_where_that_costs_balance() -> None:
    cluster = bench_cluster(layers=1)
    loads = np.ones_like(cluster.loads)
    loads[0, 5] = 40.0
    cluster = dataclasses.replace(cluster, loads=loads)
    counts = replica_counts(cluster.place(survive=1).placement, cluster.num_experts)[0]
    assert (counts == 2).all()


def test_ranks_that_are_not_there_yet_get_no_slots() -> None:
    nodes = {RankId(r): NodeId("a") for r in range(4)}
    slots = {RankId(r): 4 for r in range(4)}
    plan = place(np.ones((2, 4)), [RankId(1), RankId(3)], nodes, slots, num_ranks=4)
    assert plan.placement.shape == (2, 4, 4)
    assert (plan.placement[:, [0, 2]] == ABSENT_SLOT).all()
    assert plan.unplaced_experts == ()


@pytest.mark.parametrize(
    ("loads", "ranks", "redundant"),
    [
        (np.ones(4), [0], None),
        (np.ones((1, 0)), [0], None),
        (np.full((1, 4), np.nan), [0], None),
        (-np.ones((1, 4)), [0], None),
        (np.ones((1, 4)), [], None),
        (np.ones((1, 4)), [0, 0], None),
        (np.ones((1, 4)), [7], None),
        (np.ones((1, 4)), [0], -1),
    ],
)
def test_impossible_input_is_refused(
    loads: np.ndarray, ranks: list[int], redundant: int | None
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        place(
            loads,
            [RankId(r) for r in ranks],
            {RankId(0): NodeId("a")},
            {RankId(0): 8},
            redundant=redundant,
        )
