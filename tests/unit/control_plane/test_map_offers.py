"""When a leader may give a map to the ranks itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from control_plane.cluster_state import ClusterState
from control_plane.map_offers import EPOCHS_PER_TERM, MapOffers, first_epoch_of_next_term
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.types import Epoch, Incarnation, Member, RankId

NEWEST = 7


def member(rank: int) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(1))


def map_of(epoch: int, num_ranks: int = 4) -> ExpertMap:
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=4,
        members=tuple(member(rank) for rank in range(num_ranks)),
        placement=np.zeros((1, num_ranks, 4), dtype=np.int16),
    )


def offers(*epochs_heard: int, at: float = 10.0) -> MapOffers:
    it = MapOffers(0)
    it.on_written(Epoch(NEWEST))
    for rank, epoch in enumerate(epochs_heard):
        it.on_pong(member(rank), Epoch(epoch), at)
    return it


@pytest.mark.parametrize(
    ("heard", "now", "expected"),
    [
        ((7, 7, 7), 10.5, True),
        ((7, 7), 10.5, False),  # half of four is no majority
        ((7, 6, 5), 10.5, True),  # those that lag follow this leader too
        ((7, 7, 8), 10.5, False),  # somebody else leads that one
        ((7, 7, 7), 12.0, False),  # said too long ago
    ],
)
def test_most_members_must_follow(heard: tuple[int, ...], now: float, expected: bool) -> None:
    assert offers(*heard).has_majority(map_of(NEWEST), now) is expected


def test_a_broken_connection_does_not_count() -> None:
    it = offers(7, 7, 7)
    it.on_broken(member(0))
    assert not it.has_majority(map_of(NEWEST), 10.0)


def test_a_member_under_an_older_map_is_told_of_the_newest() -> None:
    assert offers(7, 6, 7).lag(map_of(NEWEST), 10.5)
    assert not offers(7, 7, 7).lag(map_of(NEWEST), 10.5)


def test_a_member_is_told_again_only_after_it_had_time_to_read() -> None:
    it = offers(7, 6, 7)
    asked = [it.is_unread(map_of(NEWEST), 10.0 + tenths / 10) for tenths in range(10)]
    assert asked == [False] * 5 + [True] + [False] * 4  # and the next time at 11.0

    it.on_pong(member(1), Epoch(7), 10.9)
    assert not it.is_unread(map_of(NEWEST), 10.95)
    it.on_pong(member(1), Epoch(6), 10.96)
    assert not it.is_unread(map_of(NEWEST), 11.0)


def test_no_two_terms_may_use_the_same_epoch() -> None:
    state = ClusterState(keys=Keys("test"), term=1, expert_map=map_of(NEWEST))
    first = offers()
    second_begins = first_epoch_of_next_term(state)
    assert not first.may_offer(Epoch(second_begins))
    assert first.may_offer(Epoch(second_begins - 1))

    # The second term wrote no map before a third one began.
    after = replace(state, term=2, first_epoch=second_begins)
    third_begins = first_epoch_of_next_term(after)
    second = MapOffers(second_begins)
    second.on_written(Epoch(NEWEST))
    assert third_begins == second_begins + EPOCHS_PER_TERM
    assert not second.may_offer(Epoch(third_begins))
    assert second.may_offer(Epoch(third_begins - 1))


def test_the_first_term_begins_at_the_first_epoch() -> None:
    assert first_epoch_of_next_term(ClusterState(keys=Keys("test"))) == 0
