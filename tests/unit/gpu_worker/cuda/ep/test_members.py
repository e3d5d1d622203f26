"""Who is waited for: nobody that a newer epoch has given up, and every life that the map names."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_worker.cuda.ep.members import EpMembers
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId

NUM_RANKS = 4


def life(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def map_of(epoch: int, *members: Member) -> ExpertMap:
    placement = np.zeros((1, NUM_RANKS, 1), dtype=np.int16)
    return ExpertMap(epoch=Epoch(epoch), num_experts=1, members=members, placement=placement)


@pytest.fixture
def who() -> EpMembers:
    """Of rank 0, which has met and mapped all others and adopted epoch 1 with them."""
    who = EpMembers(life(0))
    for rank in (1, 2, 3):
        who.mark_connected(life(rank))
        who.note_mapped(life(rank))
    who.adopt(map_of(1, *(life(r) for r in range(NUM_RANKS))))
    return who


def test_a_map_unmasks_its_members_and_masks_whom_it_leaves_out(who: EpMembers) -> None:
    change = who.adopt(map_of(2, life(0), life(1)))
    assert change.active == {0, 1}
    assert (change.mask, change.unmask) == ((2, 3), ())


def test_a_step_is_lost_by_members_only(who: EpMembers) -> None:
    assert who.lost_ranks([1, 1, 1, 1]) == []
    assert who.lost_ranks([1, 1, 0, 1]) == [2]
    who.adopt(map_of(2, life(0), life(1), life(3)))
    assert who.lost_ranks([1, 1, 0, 1]) == []


def test_who_was_given_up_by_a_newer_map_is_not_waited_for_under_an_older_one(
    who: EpMembers,
) -> None:
    assert who.give_up([life(2)], Epoch(3)) == [2]
    late = who.adopt(map_of(2, life(0), life(1), life(2)))
    assert late.active == {0, 1}
    assert who.lost_ranks([1, 1, 0, 0]) == [2]


def test_a_verdict_on_a_former_incarnation_does_not_touch_its_successor(who: EpMembers) -> None:
    who.give_up([life(2)], Epoch(2))
    who.adopt(map_of(2, life(0), life(1), life(3)))
    who.mark_connected(life(2, 2))
    assert who.give_up([life(2)], Epoch(2)) == []
    who.note_mapped(life(2, 2))
    grown = who.adopt(map_of(3, life(0), life(1), life(2, 2), life(3)))
    assert grown.unmask == (2,)
    assert grown.active == {0, 1, 2, 3}


def test_a_verdict_on_oneself_or_on_strangers_is_nothing_to_the_mask(who: EpMembers) -> None:
    assert who.give_up([life(0), life(1, 7)], Epoch(2)) == []


def test_no_other_incarnation_of_a_members_rank_can_be_mapped(who: EpMembers) -> None:
    with pytest.raises(ConnectionError, match="member"):
        who.may_map(RankId(1))


def test_a_member_that_was_given_up_does_not_block_its_successor(who: EpMembers) -> None:
    """The next map may need the successor's slots: no map without both would cover all experts."""
    who.give_up([life(2)], Epoch(2))
    assert not who.may_map(RankId(2))
    who.mark_connected(life(2, 2))
    assert who.is_connected(life(2, 2))
    assert who.lost_ranks([1, 1, 0, 1]) == [2]
    grown = map_of(2, life(0), life(1), life(2, 2), life(3))
    assert who.members_to_map(grown) == [life(2, 2)]
    who.note_unmapped([RankId(2)])
    who.note_mapped(life(2, 2))
    assert who.adopt(grown).active == {0, 1, 2, 3}


def test_a_member_that_could_not_be_mapped_and_was_given_up_does_not_block_its_successor(
    who: EpMembers,
) -> None:
    who.adopt(map_of(2, life(0), life(1), life(3)))
    who.mark_connected(life(2, 2))
    who.mark_unmappable(life(2, 2))
    who.adopt(map_of(3, life(0), life(1), life(2, 2), life(3)))
    with pytest.raises(ConnectionError, match="member"):
        who.may_map(RankId(2))
    assert who.give_up([life(2, 2)], Epoch(4)) == []
    assert not who.may_map(RankId(2))


def test_who_replaces_a_mapped_life_is_met_at_once_and_mapped_with_the_map(who: EpMembers) -> None:
    who.adopt(map_of(2, life(0), life(1), life(3)))
    assert not who.may_map(RankId(2))
    who.mark_connected(life(2, 2))
    assert who.is_connected(life(2, 2))
    grown = map_of(3, life(0), life(1), life(2, 2), life(3))
    assert who.members_to_map(grown) == [life(2, 2)]
    assert who.mapped([RankId(2)]) == [2]
    who.note_unmapped([RankId(2)])
    assert who.may_map(RankId(2))


def test_before_any_map_everybody_may_be_mapped() -> None:
    who = EpMembers(life(0))
    who.mark_connected(life(1))
    who.note_mapped(life(1))
    assert who.may_map(RankId(1))


def test_a_joiner_that_has_died_meanwhile_is_not_mapped(who: EpMembers) -> None:
    who.adopt(map_of(2, life(0), life(1), life(3)))
    who.mark_connected(life(2, 2))
    assert who.give_up([life(2, 2)], Epoch(4)) == [2]
    grown = map_of(3, life(0), life(1), life(2, 2), life(3))
    assert who.members_to_map(grown) == []
    assert who.adopt(grown).active == {0, 1, 3}
    assert who.lost_ranks([1, 1, 0, 1]) == [2]


def test_who_cannot_be_mapped_stays_masked_and_is_not_met_any_more(who: EpMembers) -> None:
    who.adopt(map_of(2, life(0), life(1), life(3)))
    who.mark_connected(life(2, 2))
    who.note_unmapped([RankId(2)])
    who.mark_unmappable(life(2, 2))
    grown = who.adopt(map_of(3, life(0), life(1), life(2, 2), life(3)))
    assert grown.active == {0, 1, 3}
    assert who.lost_ranks([1, 1, 0, 1]) == [2]
    assert not who.is_connected(life(2, 2))


def test_a_member_whose_next_life_was_met_already_stays_masked(who: EpMembers) -> None:
    who.adopt(map_of(2, life(0), life(1), life(3)))
    who.mark_connected(life(2, 3))
    late = map_of(3, life(0), life(1), life(2, 2), life(3))
    assert who.members_to_map(late) == []
    assert who.adopt(late).active == {0, 1, 3}


def test_who_lacks_a_member_that_nobody_has_given_up_has_waited_in_vain(who: EpMembers) -> None:
    assert who.lost_unexplained([1, 1, 0, 1]) == [life(2)]
    who.give_up([life(2)], Epoch(2))
    assert who.lost_unexplained([1, 1, 0, 1]) == []
    assert who.lost_unexplained([1, 0, 0, 1]) == [life(1)]


def test_who_is_alone_waits_for_all_again_under_the_next_map(who: EpMembers) -> None:
    alone = who.isolate()
    assert alone.active == {0}
    assert alone.mask == (1, 2, 3)
    again = who.adopt(map_of(2, *(life(r) for r in range(NUM_RANKS))))
    assert again.active == {0, 1, 2, 3}
    assert again.unmask == (1, 2, 3)


def test_a_release_that_comes_after_its_map_masks_nobody(who: EpMembers) -> None:
    """The map names the same members again, as joiners."""
    who.adopt(map_of(2, *(life(r) for r in range(NUM_RANKS))))
    assert who.give_up([life(1), life(2)], Epoch(2)) == []
