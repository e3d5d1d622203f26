"""A joiner gets what lacks replicas and its share of load; nobody else's slots move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.placement import grow, rank_loads, replica_counts, shrink
from shared.types import ABSENT_SLOT, EMPTY_SLOT, RankId
from tests.unit.control_plane.placement.clusters import Cluster, bench_cluster, bounded, clusters


@st.composite
def joins(draw: st.DrawFn) -> tuple[Cluster, list[RankId], list[RankId]]:
    cluster = draw(clusters(fits_all_experts=True).filter(lambda c: len(c.ranks) > 1))
    joined = draw(
        st.sets(st.sampled_from(cluster.ranks), min_size=1, max_size=len(cluster.ranks) - 1)
    )
    return cluster, sorted(joined), [r for r in cluster.ranks if r not in joined]


@bounded
@given(joins())
def test_members_keep_every_slot_and_joiners_hold_no_expert_twice(
    case: tuple[Cluster, list[RankId], list[RankId]],
) -> None:
    cluster, joined, members = case
    shrunk = shrink(cluster.map_of(cluster.place().placement), joined, cluster.loads).refilled
    result = grow(
        cluster.map_of(shrunk, members),
        joined,
        cluster.nodes,
        cluster.slots,
        cluster.loads,
        redundant=cluster.redundant,
    )
    assert (result.placement[:, members] == shrunk[:, members]).all()
    for rank in joined:
        count = cluster.slots[rank]
        assert (result.placement[:, rank, count:] == ABSENT_SLOT).all()
        for row in result.placement[:, rank]:
            held = row[row >= 0]
            assert len(set(held.tolist())) == len(held)
    loads = {(r.layer, r.rank, r.slot): r.expert for r in result.slot_fills}
    for place in np.argwhere(result.placement[:, joined] >= 0).tolist():
        layer, index, slot = place
        assert (
            loads.pop((layer, joined[index], slot)) == result.placement[layer, joined[index], slot]
        )
    assert not loads


@bounded
@given(joins())
def test_what_is_uncovered_comes_first(
    case: tuple[Cluster, list[RankId], list[RankId]],
) -> None:
    cluster, joined, members = case
    shrunk = shrink(cluster.map_of(cluster.place().placement), joined, cluster.loads).refilled
    result = grow(cluster.map_of(shrunk, members), joined, cluster.nodes, cluster.slots)
    room = sum(min(cluster.slots[r], cluster.num_experts) for r in joined)
    before = replica_counts(shrunk, cluster.num_experts)
    after = replica_counts(result.placement, cluster.num_experts)
    for layer in range(len(before)):
        missing = int((before[layer] == 0).sum())
        assert (after[layer] == 0).sum() == max(0, missing - room)


def test_a_rejoining_rank_restores_every_second_copy_and_takes_its_share() -> None:
    cluster = bench_cluster()
    dead = RankId(3)
    shrunk = shrink(cluster.map_of(cluster.place().placement), {dead}, cluster.loads)
    members = [r for r in cluster.ranks if r != dead]
    result = grow(
        cluster.map_of(shrunk.refilled, members),
        [dead],
        cluster.nodes,
        cluster.slots,
        cluster.loads,
    )
    counts = replica_counts(result.placement, cluster.num_experts)
    assert (counts >= 2).all()
    per_rank = rank_loads(result.placement, cluster.loads)
    assert (per_rank[:, dead] < 1.3 * per_rank.mean(axis=1)).all()
    assert (per_rank[:, dead] > 0.7 * per_rank.mean(axis=1)).all()


@bounded
@given(joins())
def test_who_holds_experts_already_loads_no_more_and_serves_as_well(
    case: tuple[Cluster, list[RankId], list[RankId]],
) -> None:
    """Joiners hold what they held before they were lost: they keep it where it is, unless something
    else is needed more, and no expert has fewer replicas on fewer nodes for it."""
    cluster, joined, members = case
    before = cluster.place().placement
    shrunk = shrink(cluster.map_of(before), joined, cluster.loads).refilled
    expert_map = cluster.map_of(shrunk, members)
    resident = {rank: before[:, rank, : cluster.slots[rank]] for rank in joined}
    results = [
        grow(
            expert_map,
            joined,
            cluster.nodes,
            cluster.slots,
            redundant=cluster.redundant,
            resident=has,
        )
        for has in (None, resident)
    ]
    anew, kept = results
    assert len(kept.slot_fills) <= len(anew.slot_fills)
    for result in results:
        for rank in joined:
            for row in result.placement[:, rank]:
                held = row[row >= 0]
                assert len(set(held.tolist())) == len(held)
    filled = [(r.placement[:, joined] >= 0).sum(axis=(1, 2)) for r in results]
    assert (filled[0] == filled[1]).all()
    lacking = [(replica_counts(r.placement, cluster.num_experts) == 0).sum(axis=1) for r in results]
    assert (lacking[0] == lacking[1]).all()
    loads = {(fill.layer, fill.rank, fill.slot) for fill in kept.slot_fills}
    for layer, index, slot in np.argwhere(kept.placement[:, joined] >= 0).tolist():
        rank = joined[index]
        is_held = resident[rank][layer, slot] == kept.placement[layer, rank, slot]
        assert is_held != ((layer, rank, slot) in loads)


def test_a_rank_that_comes_back_with_all_it_had_loads_nothing_that_it_has() -> None:
    """Redundant experts enough: no orphan had to be placed elsewhere in a slot that is needed."""
    cluster = bench_cluster()
    back = RankId(3)
    before = cluster.place().placement
    shrunk = shrink(cluster.map_of(before), {back}).refilled
    members = [r for r in cluster.ranks if r != back]
    result = grow(
        cluster.map_of(shrunk, members),
        [back],
        cluster.nodes,
        cluster.slots,
        resident={back: before[:, back]},
    )
    assert (replica_counts(result.placement, cluster.num_experts) >= 2).all()
    num_slots = before[:, back].size
    anew = grow(cluster.map_of(shrunk, members), [back], cluster.nodes, cluster.slots)
    assert len(anew.slot_fills) == num_slots
    assert len(result.slot_fills) < num_slots // 4


def test_spare_slots_of_a_joiner_stay_empty() -> None:
    cluster = bench_cluster(slots=20)
    members = cluster.ranks[:-1]
    shrunk = shrink(cluster.map_of(cluster.place().placement), {cluster.ranks[-1]}).refilled
    result = grow(
        cluster.map_of(shrunk, members),
        cluster.ranks[-1:],
        cluster.nodes,
        cluster.slots,
        redundant=64,
    )
    joiner = result.placement[:, cluster.ranks[-1]]
    assert ((joiner >= 0).sum(axis=1) == 16).all()
    assert ((joiner == EMPTY_SLOT).sum(axis=1) == 4).all()


def test_a_wider_rank_with_a_new_number_widens_the_map() -> None:
    cluster = bench_cluster(layers=1, experts=4, ranks=2, nodes=1, slots=2)
    expert_map = cluster.map_of(cluster.place().placement)
    new = RankId(5)
    nodes, slots = cluster.nodes | {new: cluster.nodes[RankId(0)]}, {new: 3}
    result = grow(expert_map, [new], nodes, slots)
    assert result.placement.shape == (1, 6, 3)
    assert (result.placement[:, new] >= 0).all()
    assert (result.placement[:, :2, 2] == ABSENT_SLOT).all()
    assert (result.placement[:, 2:5] == ABSENT_SLOT).all()


def test_a_member_cannot_join() -> None:
    cluster = bench_cluster()
    with pytest.raises(ValueError, match="is a member already"):
        grow(cluster.map_of(cluster.place().placement), [RankId(2)], cluster.nodes, cluster.slots)
