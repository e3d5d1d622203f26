"""Which keys of incarnations that are gone are deleted."""

from __future__ import annotations

from control_plane.cluster_state import ClusterState
from control_plane.stale_keys import VERDICTS_OF_RANK_MAX, delete_stale_keys
from shared.keys import Keys
from shared.records import Verdict
from shared.types import Epoch, Incarnation, Member, RankId, SuspicionReason

KEYS = Keys("test")


def verdict(rank: int, incarnation: int) -> Verdict:
    return Verdict(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        cause=SuspicionReason.EXIT,
        signals=(),
        epoch=Epoch(1),
        first_signal_at=0.0,
        decided_at=0.0,
    )


def state_with(*verdicts: Verdict) -> ClusterState:
    return ClusterState(keys=KEYS, verdicts={each.member: each for each in verdicts})


def test_of_many_verdicts_on_a_rank_the_newest_stay() -> None:
    """etcd gives each lease its whole time again when it starts, so they may last for ever."""
    lives = range(1, VERDICTS_OF_RANK_MAX + 4)
    write = delete_stale_keys(state_with(*(verdict(2, life) for life in lives), verdict(0, 1)), ())
    assert write is not None
    assert set(write.keys) == {KEYS.verdict(RankId(2), Incarnation(life)) for life in (1, 2, 3)}


def test_few_verdicts_and_those_on_members_stay() -> None:
    lives = range(1, VERDICTS_OF_RANK_MAX + 1)
    assert delete_stale_keys(state_with(*(verdict(2, life) for life in lives)), ()) is None
    member = Member(rank=RankId(2), incarnation=Incarnation(1))
    more = state_with(*(verdict(2, life) for life in (*lives, 99)))
    assert delete_stale_keys(more, (member,)) is None
