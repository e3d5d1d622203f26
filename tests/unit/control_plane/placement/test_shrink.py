"""A death moves no survivor, and every orphan that fits gets a slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.placement import SlotFill, replica_counts, shrink
from shared.types import ABSENT_SLOT, EMPTY_SLOT, RankId
from tests.unit.control_plane.placement.clusters import Cluster, bench_cluster, bounded, clusters


@st.composite
def deaths(draw: st.DrawFn) -> tuple[Cluster, set[RankId], list[RankId]]:
    cluster = draw(clusters(fits_all_experts=True).filter(lambda c: len(c.ranks) > 1))
    dead = draw(
        st.sets(st.sampled_from(cluster.ranks), min_size=1, max_size=len(cluster.ranks) - 1)
    )
    return cluster, dead, [r for r in cluster.ranks if r not in dead]


@bounded
@given(deaths())
def test_no_surviving_slot_changes_until_it_is_refilled(
    case: tuple[Cluster, set[RankId], list[RankId]],
) -> None:
    cluster, dead, alive = case
    before = cluster.place().placement
    result = shrink(cluster.map_of(before), dead, cluster.loads)
    assert (result.placement[:, alive] == before[:, alive]).all()
    refilled = {(r.layer, r.rank, r.slot) for r in result.slot_fills}
    for place in np.argwhere(result.refilled != result.placement):
        assert tuple(place.tolist()) in refilled


@bounded
@given(deaths())
def test_the_dead_hold_nothing_and_keep_their_shape(
    case: tuple[Cluster, set[RankId], list[RankId]],
) -> None:
    cluster, dead, _ = case
    before = cluster.place().placement
    for rows in (lambda r: r.placement, lambda r: r.refilled):
        after = rows(shrink(cluster.map_of(before), dead, cluster.loads))[:, sorted(dead)]
        assert (after <= EMPTY_SLOT).all()
        assert ((after == ABSENT_SLOT) == (before[:, sorted(dead)] == ABSENT_SLOT)).all()


@bounded
@given(deaths())
def test_orphans_are_covered_as_far_as_slots_go_and_nobody_loses_cover(
    case: tuple[Cluster, set[RankId], list[RankId]],
) -> None:
    cluster, dead, alive = case
    result = shrink(cluster.map_of(cluster.place().placement), dead, cluster.loads)
    uncovered = set(cluster.map_of(result.refilled, alive).uncovered())
    assert uncovered == set(result.uncoverable)
    room = sum(cluster.slots[r] for r in alive)
    for layer in range(len(cluster.loads)):
        missing = sum(1 for p in result.uncoverable if p.layer == layer)
        assert missing == max(0, cluster.num_experts - room)


@bounded
@given(deaths())
def test_only_experts_without_a_replica_are_loaded_and_each_once(
    case: tuple[Cluster, set[RankId], list[RankId]],
) -> None:
    cluster, dead, alive = case
    result = shrink(cluster.map_of(cluster.place().placement), dead, cluster.loads)
    orphans = cluster.map_of(result.placement, alive).uncovered()
    loaded = [(r.layer, r.expert) for r in result.slot_fills]
    assert sorted([*loaded, *result.uncoverable]) == sorted(orphans)
    assert len({r[:3] for r in result.slot_fills}) == len(result.slot_fills)


@bounded
@given(deaths())
def test_a_surplus_slot_is_taken_only_when_no_slot_of_the_layer_is_empty(
    case: tuple[Cluster, set[RankId], list[RankId]],
) -> None:
    cluster, dead, alive = case
    result = shrink(cluster.map_of(cluster.place().placement), dead, cluster.loads)
    for layer in {r.layer for r in result.slot_fills}:
        taken = [r for r in result.slot_fills if r.layer == layer and _held(result, r) >= 0]
        if taken:
            assert (result.refilled[layer, alive] != EMPTY_SLOT).all()


def _held(result: object, slot_fill: SlotFill) -> int:
    return int(result.placement[slot_fill.layer, slot_fill.rank, slot_fill.slot])  # type: ignore[attr-defined]


def test_the_hottest_orphan_goes_to_the_idlest_rank_with_an_empty_slot() -> None:
    cluster = bench_cluster(layers=1, experts=5, ranks=4, nodes=1, slots=2)
    placement = np.array([[[0, 1], [2, -1], [3, -1], [4, -1]]], dtype=np.int16)
    loads = np.array([[2.0, 5.0, 3.0, 1.0, 9.0]])
    result = shrink(cluster.map_of(placement), {RankId(0)}, loads)
    assert result.slot_fills == (SlotFill(0, RankId(1), 1, 0), SlotFill(0, RankId(2), 1, 1))


def test_the_coldest_orphans_are_left_over_coldest_first() -> None:
    cluster = bench_cluster(layers=1, experts=5, ranks=2, nodes=1, slots=3)
    placement = np.array([[[0, 1, 2], [3, 4, 3]]], dtype=np.int16)
    loads = np.array([[2.0, 5.0, 1.0, 9.0, 9.0]])
    result = shrink(cluster.map_of(placement), {RankId(0)}, loads)
    assert [r.expert for r in result.slot_fills] == [1]
    assert result.uncoverable == ((0, 2), (0, 0))


def test_the_replica_that_is_missed_least_gives_way() -> None:
    cluster = bench_cluster(layers=1, experts=4, ranks=3, nodes=1, slots=3)
    placement = np.array([[[3, 0, 1], [0, 1, 2], [0, 1, 2]]], dtype=np.int16)
    loads = np.array([[9.0, 6.0, 1.0, 1.0]])
    result = shrink(cluster.map_of(placement), {RankId(0)}, loads)
    counts = replica_counts(result.refilled, 4)[0]
    assert counts.tolist() == [2, 2, 1, 1]


def test_a_third_replica_gives_way_before_a_second_one_that_is_colder() -> None:
    cluster = bench_cluster(layers=1, experts=6, ranks=5, nodes=1, slots=2)
    placement = np.array([[[5, -1], [0, 1], [0, 2], [0, 3], [1, 4]]], dtype=np.int16)
    loads = np.array([[90.0, 1.0, 5.0, 5.0, 5.0, 5.0]])
    result = shrink(cluster.map_of(placement), {RankId(0)}, loads)
    assert replica_counts(result.refilled, 6)[0].tolist() == [2, 2, 1, 1, 1, 1]


def test_each_of_two_experts_gives_up_its_third_replica_before_one_gives_up_two() -> None:
    cluster = bench_cluster(layers=1, experts=6, ranks=5, nodes=1, slots=2)
    placement = np.array([[[4, 5], [0, 1], [0, 1], [0, 1], [2, 3]]], dtype=np.int16)
    loads = np.array([[1.0, 9.0, 1.0, 1.0, 1.0, 1.0]])
    result = shrink(cluster.map_of(placement), {RankId(0)}, loads)
    assert replica_counts(result.refilled, 6)[0].tolist() == [2, 2, 1, 1, 1, 1]


def test_nobody_left_is_refused() -> None:
    cluster = bench_cluster(ranks=2, nodes=1, slots=64)
    with pytest.raises(ValueError, match="no rank survives"):
        shrink(cluster.map_of(cluster.place().placement), set(cluster.ranks))


@bounded
@given(deaths(), st.data())
def test_orphans_go_to_the_unproven_only_if_the_others_have_no_slots(
    case: tuple[Cluster, set[RankId], list[RankId]], data: st.DataObject
) -> None:
    cluster, dead, alive = case
    unproven = data.draw(st.sets(st.sampled_from(alive)))
    expert_map = cluster.map_of(cluster.place().placement)
    result = shrink(expert_map, dead, cluster.loads, unproven=unproven)
    anybody = shrink(expert_map, dead, cluster.loads)
    assert len(result.uncoverable) == len(anybody.uncoverable)
    orphans = cluster.map_of(result.placement, alive).uncovered()
    loaded = [(fill.layer, fill.expert) for fill in result.slot_fills]
    assert sorted([*loaded, *result.uncoverable]) == sorted(orphans)
    given = {fill.rank for fill in result.slot_fills} & unproven
    proven = [rank for rank in alive if rank not in unproven]
    room = (result.placement[:, proven] == EMPTY_SLOT).sum(axis=(1, 2))
    needed = np.bincount([layer for layer, _ in orphans], minlength=len(room))
    if proven and (room >= needed).all():
        assert not given


def test_a_joiner_that_has_not_stepped_gets_no_orphan_and_is_no_reason_to_overwrite() -> None:
    """Slots are 0-3 on rank 0, 4-5 and two spare ones on rank 1, the same on rank 2 (unproven)."""
    cluster = bench_cluster(layers=1, experts=6, ranks=4, nodes=1, slots=4)
    placement = np.array(
        [[[0, 1, 2, 3], [4, 5, -1, -1], [4, 5, -1, -1], [0, 1, 4, 5]]], dtype=np.int16
    )
    dead, unproven = RankId(0), RankId(2)
    result = shrink(cluster.map_of(placement), {dead}, unproven={unproven})
    assert {(fill.rank, fill.slot) for fill in result.slot_fills} == {(1, 2), (1, 3)}
    full = placement.copy()
    full[0, 1] = [4, 5, 0, 1]
    result = shrink(cluster.map_of(full), {dead}, unproven={unproven})
    assert not result.uncoverable
    assert {fill.rank for fill in result.slot_fills} <= {1, 3}
    held_by_proven = set(result.refilled[0, [1, 3]].ravel().tolist())
    assert {0, 1, 2, 3, 4, 5} <= held_by_proven
