"""After a death no survivor loads more than the slots force: the longest load is proven least by
the set of ranks that is forced to it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.placement import ShrinkResult, SlotFill, place, replica_counts, shrink
from shared.expert_map import ExpertMap, Placement
from shared.types import (
    ABSENT_SLOT,
    EMPTY_SLOT,
    Epoch,
    ExpertId,
    Incarnation,
    Member,
    NodeId,
    RankId,
    SlotId,
)
from tests.unit.control_plane.placement.clusters import Cluster, bounded, clusters

DEAD = RankId(0)


def map_of(placement: Placement, num_experts: int) -> ExpertMap:
    members = tuple(
        Member(rank=RankId(r), incarnation=Incarnation(1)) for r in range(placement.shape[1])
    )
    return ExpertMap(epoch=Epoch(1), num_experts=num_experts, members=members, placement=placement)


@st.composite
def wounded(draw: st.DrawFn) -> ExpertMap:
    """Maps as many deaths and joins leave them: anything anywhere, ranks of any size."""
    num_layers, num_ranks = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    num_experts, width = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_layers, num_ranks, width)
    placement = random.integers(0, draw(st.integers(1, num_experts)), shape).astype(np.int16)
    placement[random.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.4]))] = EMPTY_SLOT
    if draw(st.booleans()):
        beyond = np.arange(width) >= random.integers(0, width + 1, num_ranks)[:, None]
        placement[:, beyond] = ABSENT_SLOT
    return map_of(placement, num_experts)


def loads_by_rank(result: ShrinkResult) -> list[int]:
    """Of the survivors of `DEAD`."""
    counts = np.bincount([r.rank for r in result.slot_fills], minlength=result.placement.shape[1])
    return [int(n) for n in counts[DEAD + 1 :]]


def rank_sets(num_ranks: int) -> Iterator[tuple[int, ...]]:
    sizes = range(1, num_ranks + 1)
    return chain.from_iterable(combinations(range(num_ranks), size) for size in sizes)


def forced(rows: Placement, num_experts: int, ranks: tuple[int, ...]) -> int:
    """Loads of one layer that fall to `ranks`, whatever the others take. `rows`: its survivors."""
    counts = replica_counts(rows[None], num_experts)[0]
    covered = min(num_experts, int((rows > ABSENT_SLOT).sum()))
    to_load = covered - int((counts > 0).sum())
    empty = (rows == EMPTY_SLOT).sum(axis=1)
    others = [r for r in range(len(rows)) if r not in ranks]
    if to_load <= empty.sum():
        return max(0, to_load - int(empty[others].sum()))
    held_by_others = replica_counts(rows[None, others], num_experts)[0]
    can_give_way = int(np.minimum(held_by_others, np.maximum(counts - 1, 0)).sum())
    mine = int(empty[list(ranks)].sum())
    return mine + max(0, to_load - int(empty.sum()) - can_give_way)


def least_num_loaded_max(survivors: Placement, num_experts: int) -> int:
    """No plan that fills empty slots first loads less: a set of ranks divides what is forced on it.
    The set of all ranks gives ceil(orphans / survivors)."""
    return max(
        -(-sum(forced(rows, num_experts, ranks) for rows in survivors) // len(ranks))
        for ranks in rank_sets(survivors.shape[1])
    )


@settings(max_examples=300, deadline=None)
@given(wounded())
def test_nobody_loads_more_than_the_slots_force(expert_map: ExpertMap) -> None:
    result = shrink(expert_map, {DEAD})
    survivors = expert_map.placement[:, DEAD + 1 :]
    least = least_num_loaded_max(survivors, expert_map.num_experts)
    assert max(loads_by_rank(result)) == least


@bounded
@given(clusters(fits_all_experts=True).filter(lambda c: len(c.ranks) > 1))
def test_nobody_loads_more_than_is_forced_when_a_planned_cluster_loses_a_rank(
    cluster: Cluster,
) -> None:
    placement = cluster.place().placement
    result = shrink(cluster.map_of(placement), {DEAD}, cluster.loads)
    least = least_num_loaded_max(placement[:, DEAD + 1 :], cluster.num_experts)
    assert max(loads_by_rank(result)) == least


@settings(max_examples=200, deadline=None)
@given(wounded())
def test_what_gives_way_is_empty_or_else_surplus(expert_map: ExpertMap) -> None:
    result = shrink(expert_map, {DEAD})
    num_experts, slots = expert_map.num_experts, (result.placement > ABSENT_SLOT)
    slots[:, DEAD] = False
    before = replica_counts(result.placement, num_experts)
    after = replica_counts(result.refilled, num_experts)
    assert ((after > 0).sum(axis=1) == np.minimum(slots.sum(axis=(1, 2)), num_experts)).all()
    assert (after[before > 0] > 0).all()
    assert (after[before == 0] <= 1).all()
    changed = result.refilled != result.placement
    surplus_taken = (changed & (result.placement >= 0)).any(axis=(1, 2))
    assert (result.refilled[surplus_taken][slots[surplus_taken]] != EMPTY_SLOT).all()
    assert {tuple(place) for place in np.argwhere(changed)} == {r[:3] for r in result.slot_fills}


def test_half_of_the_ranks_die_and_the_survivors_load_alike() -> None:
    ranks = [RankId(r) for r in range(16)]
    nodes = {r: NodeId(f"node{r // 8}") for r in ranks}
    loads = np.ones((7, 32))
    placement = place(loads, ranks, nodes, dict.fromkeys(ranks, 4), redundant=32).placement
    dead = {RankId(r) for r in (0, 1, 2, 3, 8, 9, 10, 11)}
    result = shrink(map_of(placement, 32), dead)
    per_rank = np.bincount([r.rank for r in result.slot_fills], minlength=16)
    assert len(result.slot_fills) == 98
    assert per_rank.max() == 13


def test_a_rank_hands_its_load_to_one_that_hands_on_its_own() -> None:
    """Only rank 1 has room in layer 2. So its load of layer 0 goes to rank 2, and rank 2's of
    layer 1 to rank 3."""
    placement = np.array(
        [
            [[4, -1], [0, -1], [1, -1], [2, 3]],
            [[4, -1], [0, 1], [2, -1], [3, -1]],
            [[4, -1], [0, -1], [1, 2], [3, 0]],
        ],
        dtype=np.int16,
    )
    result = shrink(map_of(placement, 5), {DEAD})
    assert [(r.layer, r.rank) for r in result.slot_fills] == [(0, 2), (1, 3), (2, 1)]


def test_two_hand_their_loads_of_one_layer_to_the_same_rank() -> None:
    placement = np.array(
        [
            [[3, 4, -1], [0, -1, -1], [1, -1, -1], [2, -1, -1]],
            [[3, 4, -1], [0, -1, -1], [1, -1, -1], [2, 0, 1]],
            [[3, 4, -1], [0, -1, -1], [1, -1, -1], [2, 0, 1]],
        ],
        dtype=np.int16,
    )
    loads = np.array([[1.0, 1.0, 9.0, 1.0, 1.0]] * 3)
    result = shrink(map_of(placement, 5), {DEAD}, loads)
    assert loads_by_rank(result) == [2, 2, 2]
    assert sorted(result.refilled[0, 3].tolist()) == [2, 3, 4]


def test_a_second_replica_gives_way_before_a_third_where_that_makes_the_longest_load_shorter() -> (
    None
):
    """Ranks 1 to 3 must load one each in layer 0; so in layer 1 not expert 0, which they all hold,
    gives way, but expert 1 on rank 4."""
    placement = np.array(
        [
            [[3, 4], [0, -1], [1, -1], [2, -1], [0, 1]],
            [[5, 4], [0, 1], [0, 2], [0, 3], [1, 4]],
        ],
        dtype=np.int16,
    )
    result = shrink(map_of(placement, 6), {DEAD})
    assert result.slot_fills[-1] == SlotFill(1, RankId(4), SlotId(0), ExpertId(5))


def test_the_only_replica_gives_way_where_another_of_it_stays() -> None:
    """Expert 0 is all that ranks 1 and 2 can give up in layer 0, once: rank 1 holds back in
    layer 0, as only it has room in layer 1."""
    placement = np.array([[[2, -1], [0, 1], [0, 3]], [[3, 0], [1, -1], [0, 2]]], dtype=np.int16)
    loads = np.array([[1.0, 1.0, 1.0, 9.0], [1.0] * 4])
    result = shrink(map_of(placement, 4), {DEAD}, loads)
    assert [(r.layer, r.rank, r.slot) for r in result.slot_fills] == [(0, 2, 0), (1, 1, 1)]
