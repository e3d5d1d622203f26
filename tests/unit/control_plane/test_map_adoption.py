"""When the map in force counts as adopted, and which joiners the next one lists."""

from __future__ import annotations

import numpy as np

from control_plane.map_adoption import MapAdoption
from shared.expert_map import ExpertMap
from shared.types import EMPTY_SLOT, Epoch, Incarnation, Member, RankId

PATIENCE_S = 10.0


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


MEMBERS = tuple(member(rank) for rank in range(4))


def map_of(epoch: int, members: tuple[Member, ...], joiners: tuple[int, ...] = ()) -> ExpertMap:
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=1,
        members=members,
        placement=np.full((1, 4, 1), EMPTY_SLOT, dtype=np.int16),
        joiners=tuple(RankId(r) for r in joiners),
    )


def under(expert_map: ExpertMap | None, now: float = 0.0) -> MapAdoption:
    adoption = MapAdoption(PATIENCE_S)
    adoption.on_map(expert_map, set(MEMBERS), now)
    return adoption


def with_pongs(adoption: MapAdoption, *ranks: int, epoch: int) -> MapAdoption:
    for rank in ranks:
        adoption.on_adopted(member(rank), Epoch(epoch))
    return adoption


def test_of_the_first_map_everybody_is_a_joiner() -> None:
    adoption = under(None)
    assert adoption.may_follow(0.0)
    assert adoption.joiners(MEMBERS) == (0, 1, 2, 3)


def test_a_map_is_adopted_once_each_member_runs_under_it_or_under_a_newer_one() -> None:
    adoption = under(map_of(5, MEMBERS))
    assert not adoption.is_complete
    with_pongs(adoption, 0, 1, epoch=5)
    with_pongs(adoption, 2, epoch=6)
    with_pongs(adoption, 3, epoch=4)
    assert not adoption.is_complete
    with_pongs(adoption, 3, epoch=5)
    assert adoption.is_complete


def test_a_pong_of_a_former_incarnation_is_not_its_successors() -> None:
    adoption = under(map_of(5, (*MEMBERS[:3], member(3, 2)), joiners=(3,)))
    with_pongs(adoption, 0, 1, 2, 3, epoch=5)
    assert not adoption.is_complete


def test_joiners_are_proven_when_all_have_adopted_their_map() -> None:
    adoption = under(map_of(5, MEMBERS, joiners=(2, 3)))
    with_pongs(adoption, 0, 1, 2, epoch=5)
    assert adoption.joiners(MEMBERS) == (2, 3)
    with_pongs(adoption, 3, epoch=5)
    assert adoption.joiners(MEMBERS) == ()


def test_an_unproven_joiner_stays_one_in_the_map_after_a_death() -> None:
    adoption = under(map_of(5, MEMBERS, joiners=(2, 3)))
    with_pongs(adoption, 0, 1, 2, epoch=5)
    assert adoption.joiners((member(0), member(2))) == (2,)


def test_new_incarnations_are_joiners_beside_unproven_ones() -> None:
    adoption = under(map_of(5, MEMBERS[:3], joiners=(2,)))
    assert adoption.joiners(MEMBERS) == (2, 3)
    with_pongs(adoption, 0, 1, 2, epoch=5)
    assert adoption.joiners(MEMBERS) == (3,)


def test_a_rank_back_at_once_is_a_joiner_though_its_former_incarnation_was_proven() -> None:
    adoption = with_pongs(under(map_of(5, MEMBERS)), 0, 1, 2, 3, epoch=5)
    assert adoption.joiners((*MEMBERS[:3], member(3, 2))) == (3,)


def test_a_member_that_never_adopts_holds_the_others_up_for_a_while_only() -> None:
    adoption = with_pongs(under(map_of(5, MEMBERS, joiners=(3,)), now=100.0), 0, 1, 2, epoch=5)
    assert not adoption.may_follow(100.0 + PATIENCE_S - 0.1)
    assert adoption.may_follow(100.0 + PATIENCE_S)
    assert adoption.joiners(MEMBERS) == (3,)


def test_patience_begins_anew_with_each_map() -> None:
    adoption = under(map_of(5, MEMBERS), now=100.0)
    adoption.on_map(map_of(5, MEMBERS), set(MEMBERS), 105.0)
    adoption.on_map(map_of(6, MEMBERS), set(MEMBERS), 109.0)
    assert not adoption.may_follow(100.0 + PATIENCE_S)
    assert adoption.may_follow(109.0 + PATIENCE_S)


def test_a_member_that_has_lost_count_makes_all_members_joiners_of_the_next_map() -> None:
    adoption = with_pongs(under(map_of(5, MEMBERS)), 0, 1, 2, 3, epoch=5)
    assert not adoption.needs_resync(MEMBERS)
    adoption.on_out_of_step(member(2), Epoch(5))
    assert adoption.needs_resync(MEMBERS)
    assert adoption.joiners(MEMBERS) == (0, 1, 2, 3)
    assert not adoption.needs_resync(MEMBERS[:2])  # without that one


def test_a_map_of_joiners_resyncs_once() -> None:
    adoption = under(map_of(5, MEMBERS))
    adoption.on_out_of_step(member(2), Epoch(5))
    adoption.on_map(map_of(6, MEMBERS, (0, 1, 2, 3)), set(MEMBERS), 0.0)
    assert not adoption.needs_resync(MEMBERS)  # it has yet to adopt it
    adoption.on_out_of_step(member(2), Epoch(6))
    assert adoption.needs_resync(MEMBERS)
    adoption.on_out_of_step(member(2), Epoch(0))
    assert not adoption.needs_resync(MEMBERS)


def test_a_map_that_does_not_name_the_one_that_has_lost_count_as_a_joiner_is_no_resync() -> None:
    adoption = under(map_of(5, MEMBERS))
    adoption.on_out_of_step(member(2), Epoch(5))
    adoption.on_map(map_of(6, MEMBERS[:3]), set(MEMBERS), 0.0)
    assert adoption.needs_resync(MEMBERS[:3])


def test_a_standstill_makes_all_members_joiners_of_one_map() -> None:
    adoption = with_pongs(under(map_of(5, MEMBERS)), 0, 1, 2, 3, epoch=5)
    adoption.on_standstill()
    assert adoption.needs_resync(MEMBERS)
    assert adoption.joiners(MEMBERS) == (0, 1, 2, 3)
    adoption.on_map(map_of(6, MEMBERS, (0, 1, 2, 3)), set(MEMBERS), 0.0)
    assert not adoption.needs_resync(MEMBERS)
