"""The election: who may act, and what falls due, in every state."""

from __future__ import annotations

import pytest

from control_plane.election import (
    Campaign,
    Election,
    ElectionState,
    GrantLease,
    RenewLease,
    RevokeLease,
)

TTL_S = 3.0


@pytest.fixture
def election() -> Election:
    return Election(name="a", ttl_s=TTL_S)


def standby(election: Election, now: float = 0.0) -> Election:
    election.on_granted(7, now)
    return election


def leading(election: Election, now: float = 0.0) -> Election:
    standby(election, now).on_key(None, 0)
    assert election.next_action(now) == Campaign(lease_id=7)
    election.on_won(50)
    assert election.next_action(now) is None
    return election


def test_first_comes_a_lease(election: Election) -> None:
    assert election.next_action(0.0) == GrantLease()
    assert not election.may_act(0.0)


def test_nobody_campaigns_before_the_key_was_looked_at(election: Election) -> None:
    assert standby(election).next_action(0.0) is None


def test_the_absent_key_is_campaigned_for_and_winning_is_the_right_to_act(
    election: Election,
) -> None:
    assert leading(election).may_act(0.1)
    assert election.leader_revision == 50


def test_a_held_key_is_left_alone_until_it_goes(election: Election) -> None:
    standby(election).on_key("b", 40)
    assert election.next_action(0.1) is None
    election.on_key(None, 0)
    assert election.next_action(0.1) == Campaign(lease_id=7)


def test_a_key_whose_holder_the_ranks_have_lost_is_campaigned_for_and_no_other(
    election: Election,
) -> None:
    standby(election).on_key("b", 40)
    assert election.on_lost_leader(40)
    assert not election.on_lost_leader(40)
    assert election.next_action(0.1) == Campaign(lease_id=7, against_revision=40)
    election.on_not_won(0.1)
    election.on_key("c", 41)
    assert election.next_action(0.5) is None
    assert election.on_lost_leader(None)
    election.on_key("b", 40)
    assert election.next_action(0.5) is None


def test_a_leader_does_not_campaign_against_itself(election: Election) -> None:
    leading(election).on_lost_leader(50)
    assert election.next_action(0.1) is None


def test_a_lost_campaign_is_retried_after_a_backoff_if_the_key_is_still_absent(
    election: Election,
) -> None:
    standby(election).on_key(None, 0)
    election.on_not_won(0.2)
    assert election.next_action(0.2) is None
    assert 0 < election.next_action_in_s(0.2) < 0.2
    assert election.next_action(0.4) == Campaign(lease_id=7)
    election.on_key("b", 60)
    assert election.next_action(0.4) is None


def test_a_campaign_whose_reply_was_lost_counts_when_the_watch_shows_it(
    election: Election,
) -> None:
    standby(election).on_key(None, 0)
    election.next_action(0.0)
    election.on_not_won(0.0)
    election.on_key("a", 50)
    assert election.may_act(0.1)
    assert election.leader_revision == 50


def test_the_key_of_a_former_lease_is_not_ours(election: Election) -> None:
    leading(election)
    election.on_lease_lost()
    election.on_granted(8, 1.0)
    election.on_key("a", 50)
    assert not election.may_act(1.0)


@pytest.mark.parametrize(("name", "revision"), [(None, 0), ("b", 60)])
def test_a_leader_whose_key_is_gone_or_taken_stops(
    election: Election, name: str | None, revision: int
) -> None:
    leading(election).on_key(name, revision)
    assert not election.may_act(0.1)
    assert election.state is ElectionState.STANDBY


def test_seeing_its_own_key_changes_nothing(election: Election) -> None:
    leading(election).on_key("a", 50)
    assert election.may_act(0.1)


def test_renewal_falls_due_after_a_third_of_the_ttl(election: Election) -> None:
    leading(election)
    assert election.next_action(TTL_S / 3 - 0.01) is None
    assert election.next_action(TTL_S / 3) == RenewLease(lease_id=7)
    election.on_renewed(TTL_S / 3)
    assert election.next_action(TTL_S / 3 + 0.1) is None


def test_a_leader_stops_before_its_lease_could_expire_and_goes_on_when_renewed(
    election: Election,
) -> None:
    leading(election)
    assert election.may_act(TTL_S * 0.7)
    assert not election.may_act(TTL_S * 0.9)
    election.on_renewed(TTL_S * 0.9)
    assert election.may_act(TTL_S * 0.95)


def test_a_lost_lease_ends_the_leadership_and_asks_for_a_new_one(election: Election) -> None:
    leading(election).on_lease_lost()
    assert not election.may_act(0.1)
    assert election.next_action(0.1) == GrantLease()


def test_resigning_revokes_the_lease_and_is_final(election: Election) -> None:
    leading(election).resign()
    assert not election.may_act(0.1)
    assert election.next_action(0.1) == RevokeLease(lease_id=7)
    election.on_revoked()
    election.on_key(None, 0)
    election.on_granted(9, 0.2)
    assert election.next_action(5.0) is None


def test_resigning_without_a_lease_leaves_nothing_to_do(election: Election) -> None:
    election.resign()
    assert election.next_action(0.0) is None
