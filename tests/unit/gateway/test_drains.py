"""Which members are drained, and when their grace time is over: it runs from when a gateway saw the
drain, and never longer than from when it was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.cluster_view import ClusterView
from gateway.drains import Drains
from shared.codec import pack
from shared.desired_state import AfterDrain, DesiredState, Drain
from shared.keys import Keys
from shared.types import Incarnation, Member, RankId
from tests.support.toy_rank import ToyRank

M0 = Member(rank=RankId(0), incarnation=Incarnation(1))
M1 = Member(rank=RankId(1), incarnation=Incarnation(2))
WALL = 1000.0


def view(*drains: Drain) -> ClusterView:
    return ClusterView(members=(M0, M1), desired=DesiredState(drains=drains))


def drain(rank: int, after: AfterDrain = AfterDrain.STAY, incarnation: int = 0) -> Drain:
    return Drain(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        requested_at=WALL,
        grace_s=30.0,
        after=after,
    )


def test_the_desired_state_comes_from_its_key() -> None:
    keys = Keys("i")
    desired = DesiredState(drains=(drain(1),))
    assert ClusterView().with_value(keys, keys.desired, pack(desired)).desired == desired


def test_a_drain_is_due_when_its_grace_time_is_over() -> None:
    drains = Drains()
    drains.on_view(view(drain(1)), now=50.0, wall=WALL)
    assert drains.members == {M1}
    assert drains.next_due_at(50.0) == 80.0
    assert drains.due(79.9) == []
    assert drains.due(80.0) == [M1]
    assert drains.next_due_at(80.0) is None


@pytest.mark.parametrize(
    ("wall", "due_at"),
    [
        (WALL + 20, 60.0),  # seen late
        (WALL + 500, 50.0),  # long over, or this host's clock is ahead
        (WALL - 500, 80.0),  # this host's clock is behind
    ],
)
def test_a_drain_that_is_seen_late_lasts_no_longer(wall: float, due_at: float) -> None:
    drains = Drains()
    drains.on_view(view(drain(1)), now=50.0, wall=wall)
    assert drains.due(due_at - 0.01) == []
    assert drains.due(due_at) == [M1]


def test_a_later_view_starts_no_grace_time_anew_unless_the_drain_is_another() -> None:
    drains = Drains()
    drains.on_view(view(drain(1)), now=50.0, wall=WALL)
    drains.on_view(view(drain(1), drain(0)), now=60.0, wall=WALL)
    assert drains.due(80.0) == [M1]
    drains.on_view(view(replace(drain(1), grace_s=5.0)), now=61.0, wall=WALL)
    assert drains.members == {M1}
    assert drains.due(66.0) == [M1]


def test_an_undrained_rank_is_drained_no_more() -> None:
    drains = Drains()
    drains.on_view(view(drain(1)), now=50.0, wall=WALL)
    drains.on_view(view(), now=51.0, wall=WALL)
    assert drains.members == frozenset()
    assert drains.due(1e9) == []


def test_a_restart_means_the_incarnation_that_was_there_and_no_later_one() -> None:
    drains = Drains()
    drains.on_view(view(drain(1, AfterDrain.RESTART, incarnation=1)), now=0.0, wall=WALL)
    assert drains.members == frozenset()
    drains.on_view(view(drain(1, AfterDrain.RESTART, incarnation=2)), now=0.0, wall=WALL)
    assert drains.members == {M1}


def test_a_rank_that_says_that_it_leaves_gets_nothing_and_keeps_what_it_has() -> None:
    leaving = replace(ToyRank(0).record(), leaving=True)
    drains = Drains()
    drains.on_view(replace(view(), ranks={"a": leaving}), now=0.0, wall=WALL)
    assert drains.members == {M0}
    assert drains.due(1e9) == []
    assert drains.next_due_at(0.0) is None
    drains.on_view(replace(view(drain(0)), ranks={"a": leaving}), now=5.0, wall=WALL)
    assert drains.due(35.0) == [M0]
