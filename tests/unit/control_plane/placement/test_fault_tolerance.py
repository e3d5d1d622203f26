"""What a map is said to survive is what it does survive, checked against every possible failure."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given

from control_plane.placement import advise, compute_fault_tolerance, describe, shrink
from shared.expert_map import Placement
from shared.types import NodeId, RankId
from tests.unit.control_plane.placement.clusters import Cluster, bench_cluster, bounded, clusters


def lost(cluster: Cluster, placement: Placement, dead: set[RankId]) -> int:
    if dead == set(cluster.ranks):
        return cluster.loads.size
    alive = [r for r in cluster.ranks if r not in dead]
    after = shrink(cluster.map_of(placement), dead).placement
    return len(cluster.map_of(after, alive).uncovered())


def on_nodes(cluster: Cluster, names: tuple[NodeId, ...]) -> set[RankId]:
    return {r for r in cluster.ranks if cluster.nodes[r] in names}


@bounded
@given(clusters(fits_all_experts=True))
def test_rank_failures_survived_are_exact(cluster: Cluster) -> None:
    placement = cluster.place().placement
    tolerance = compute_fault_tolerance(cluster.map_of(placement), cluster.nodes)
    worst = [
        max(lost(cluster, placement, set(dead)) for dead in combinations(cluster.ranks, k))
        for k in range(len(cluster.ranks) + 1)
    ]
    assert tolerance.rank_failures == max(k for k, n in enumerate(worst) if n == 0)


@bounded
@given(clusters(fits_all_experts=True))
def test_node_failures_survived_are_exact(cluster: Cluster) -> None:
    placement = cluster.place().placement
    tolerance = compute_fault_tolerance(cluster.map_of(placement), cluster.nodes)
    names = sorted(set(cluster.nodes.values()))
    worst = [
        max(lost(cluster, placement, on_nodes(cluster, d)) for d in combinations(names, k))
        for k in range(len(names) + 1)
    ]
    assert tolerance.node_failures == max(k for k, n in enumerate(worst) if n == 0)


@bounded
@given(clusters(fits_all_experts=True))
def test_failures_survived_with_a_reload_are_exact(cluster: Cluster) -> None:
    expert_map = cluster.map_of(cluster.place().placement)
    tolerance = compute_fault_tolerance(expert_map, cluster.nodes)
    worst = [
        max(
            len(shrink(expert_map, set(dead)).uncoverable)
            for dead in combinations(cluster.ranks, k)
        )
        for k in range(len(cluster.ranks))
    ]
    assert tolerance.rank_failures_with_reload == max(k for k, n in enumerate(worst) if n == 0)


@bounded
@given(clusters(fits_all_experts=True))
def test_what_each_rank_and_node_takes_along_is_counted(cluster: Cluster) -> None:
    placement = cluster.place().placement
    tolerance = compute_fault_tolerance(cluster.map_of(placement), cluster.nodes)
    for rank, count in tolerance.lost_by_rank.items():
        assert count == lost(cluster, placement, {rank})
    for node, count in tolerance.lost_by_node.items():
        assert count == lost(cluster, placement, on_nodes(cluster, (node,)))


def test_the_advised_redundancy_does_survive_more() -> None:
    cluster = bench_cluster(experts=32, slots=16)
    thin = Cluster(loads=cluster.loads, nodes=cluster.nodes, slots=cluster.slots, redundant=8)
    thin_map = thin.map_of(thin.place().placement)
    assert compute_fault_tolerance(thin_map, thin.nodes).rank_failures == 0
    for advice in advise(thin_map, thin.nodes):
        richer = Cluster(
            loads=cluster.loads,
            nodes=cluster.nodes,
            slots=dict.fromkeys(cluster.slots, advice.slots_per_rank),
            redundant=advice.redundant,
        )
        placed = richer.map_of(richer.place(advice.rank_failures).placement)
        assert compute_fault_tolerance(placed, richer.nodes).rank_failures >= advice.rank_failures
        assert compute_fault_tolerance(placed, richer.nodes).node_failures >= advice.node_failures


def test_the_start_up_sentence_names_what_is_survived_and_what_would_survive_more() -> None:
    cluster = bench_cluster()
    expert_map = cluster.map_of(cluster.place().placement)
    text = describe(
        compute_fault_tolerance(expert_map, cluster.nodes), advise(expert_map, cluster.nodes)
    )
    assert "any 1 rank failure and any 1 node failure without a reload" in text
    assert "any 2 rank failures" in text
