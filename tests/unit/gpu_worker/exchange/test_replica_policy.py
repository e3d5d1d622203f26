"""Properties of the choice among an expert's replicas."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.exchange.replica_policy import UNCOVERED, ReplicaPolicy, choose_replicas
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId

UNTIMED = settings(deadline=None)


@st.composite
def maps(draw: st.DrawFn) -> ExpertMap:
    layers = draw(st.integers(1, 3))
    ranks = draw(st.integers(1, 6))
    slots = draw(st.integers(1, 6))
    experts = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    placement = rng.integers(-2, experts, size=(layers, ranks, slots)).astype(np.int16)
    members = draw(st.sets(st.integers(0, ranks - 1), min_size=1))
    for rank in set(range(ranks)) - members:
        placement[:, rank] = -1
    return ExpertMap(
        epoch=Epoch(1),
        num_experts=experts,
        members=tuple(Member(rank=RankId(r), incarnation=Incarnation(1)) for r in sorted(members)),
        placement=placement,
    )


@UNTIMED
@given(maps(), st.sampled_from(ReplicaPolicy))
def test_the_chosen_slot_holds_the_expert_and_only_uncovered_experts_have_none(
    expert_map: ExpertMap, policy: ReplicaPolicy
) -> None:
    counts = expert_map.replica_counts()
    for member in expert_map.members:
        choice = choose_replicas(expert_map, member.rank, policy)
        for (layer, turn, expert), rank in np.ndenumerate(choice.rank_LUE):
            assert (rank == UNCOVERED) == (counts[layer, expert] == 0)
            if rank != UNCOVERED:
                slot = choice.slot_LUE[layer, turn, expert]
                assert expert_map.placement[layer, rank, slot] == expert


@UNTIMED
@given(maps())
def test_spread_lets_a_rank_compute_what_it_holds(expert_map: ExpertMap) -> None:
    for member in expert_map.members:
        choice = choose_replicas(expert_map, member.rank, ReplicaPolicy.SPREAD)
        held = expert_map.placement[:, member.rank]
        for layer in range(expert_map.num_layers):
            for expert in held[layer][held[layer] >= 0]:
                assert (choice.rank_LUE[layer, :, expert] == member.rank).all()


@UNTIMED
@given(maps())
def test_spread_deals_the_turns_of_other_ranks_evenly_to_the_holders(
    expert_map: ExpertMap,
) -> None:
    choices = {
        m.rank: choose_replicas(expert_map, m.rank, ReplicaPolicy.SPREAD)
        for m in expert_map.members
    }
    for layer in range(expert_map.num_layers):
        for expert in range(expert_map.num_experts):
            holders = set(np.nonzero((expert_map.placement[layer] == expert).any(axis=1))[0])
            load = dict.fromkeys(holders, 0)
            for rank, choice in choices.items():
                for chosen in choice.rank_LUE[layer, :, expert]:
                    if rank not in holders and chosen != UNCOVERED:
                        load[chosen] += 1
            assert not load or max(load.values()) - min(load.values()) <= 1


@UNTIMED
@given(maps())
def test_gather_sends_all_ranks_to_one_replica(expert_map: ExpertMap) -> None:
    first, *others = (choose_replicas(expert_map, m.rank) for m in expert_map.members)
    for other in others:
        np.testing.assert_array_equal(first.rank_LUE, other.rank_LUE)
        np.testing.assert_array_equal(first.slot_LUE, other.slot_LUE)


def test_gather_loads_the_ranks_evenly_where_every_expert_is_there_twice() -> None:
    num_ranks, num_experts, slots = 4, 64, 32
    ranks = np.arange(num_ranks)[:, None]
    placement = ((ranks // 2 * slots + np.arange(slots)) % num_experts)[None].astype(np.int16)
    members = tuple(Member(rank=RankId(r), incarnation=Incarnation(1)) for r in range(num_ranks))
    expert_map = ExpertMap(
        epoch=Epoch(1), num_experts=num_experts, members=members, placement=placement
    )
    choice = choose_replicas(expert_map, RankId(0))
    assert np.bincount(choice.rank_LUE[0, 0], minlength=num_ranks).tolist() == [16] * 4


def test_three_replicas_on_four_ranks_share_the_load_in_equal_parts() -> None:
    """With one choice a rank and expert, one of the three would carry half."""
    placement = np.array([[[0], [0], [0], [1]]], dtype=np.int16)
    members = tuple(Member(rank=RankId(r), incarnation=Incarnation(1)) for r in range(4))
    expert_map = ExpertMap(epoch=Epoch(1), num_experts=2, members=members, placement=placement)
    load = np.zeros(4)
    for member in members:
        choice = choose_replicas(expert_map, member.rank, ReplicaPolicy.SPREAD)
        load += np.bincount(choice.rank_LUE[0, :, 0], minlength=4)
    assert load.tolist() == [16, 16, 16, 0]
