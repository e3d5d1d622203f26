"""Decides who leads: the leader key under a control plane's own lease. Pure; `leadership` does the
I/O.

Theory of operation. A transaction takes the key if it is absent, or if it is still that of a leader
whom the ranks have lost (`leader_doubts`), and writes the next term with it.
The holder acts only until shortly before its lease could expire, counted from the moment at which
it asked for the last successful renewal. Every write also compares the key's revision, so this rule
is not needed for safety; it only avoids writes that would fail.

    state     | event                        | next      | action
    ----------+------------------------------+-----------+------------------------
    no_lease  | begin, lease lost            | no_lease  | GrantLease, until granted
    no_lease  | granted                      | standby   | Campaign, if the key is absent
    standby   | key gone                     | standby   | Campaign
    standby   | the ranks have lost who leads| standby   | Campaign against that key alone
    standby   | won                          | leading   |
    standby   | not won                      | standby   | Campaign after a backoff, if absent
    leading   | key gone, or another's       | standby   | Campaign, if absent
    leading   | renewal late                 | leading   | may not act until renewed
    any       | renewal due                  | same      | RenewLease
    any       | lease lost                   | no_lease  | GrantLease
    any       | resign                       | resigned  | RevokeLease
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_CAMPAIGN_BACKOFF_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantLease:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewLease:
    lease_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """Take the key, if it is still absent, or still the one of that revision."""

    lease_id: int
    against_revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeLease:
    lease_id: int


Action = GrantLease | RenewLease | Campaign | RevokeLease


class ElectionState(Enum):
    NO_LEASE = "no_lease"
    STANDBY = "standby"
    LEADING = "leading"
    RESIGNED = "resigned"


class Election:
    """`next_action(now)` returns the next action to perform. Its outcome comes back through an
    `on_` method."""

    def __init__(self, *, name: str, ttl_s: float) -> None:
        self._name = name
        self._ttl_s = ttl_s
        self._margin_s = ttl_s / 5
        self.state = ElectionState.NO_LEASE
        self.leader_revision = 0
        self._lease_id = 0
        self._renewed_at = 0.0
        self._key_revision: int | None = None  # None: not seen yet; 0: absent
        self._lost_revision: int | None = None  # of a leader whom the ranks have lost
        self._campaigned_lease_id = 0
        self._campaign_at = 0.0

    def may_act(self, now: float) -> bool:
        return (
            self.state is ElectionState.LEADING
            and now < self._renewed_at + self._ttl_s - self._margin_s
        )

    def _may_campaign(self, now: float) -> bool:
        return (
            self.state is ElectionState.STANDBY and self._is_key_free and now >= self._campaign_at
        )

    @property
    def _is_key_free(self) -> bool:
        return self._key_revision is not None and self._key_revision in (0, self._lost_revision)

    def next_action(self, now: float) -> Action | None:
        if self.state is ElectionState.RESIGNED:
            return RevokeLease(lease_id=self._lease_id) if self._lease_id else None
        if self.state is ElectionState.NO_LEASE:
            return GrantLease()
        if self._may_campaign(now):
            self._campaigned_lease_id = self._lease_id
            return Campaign(lease_id=self._lease_id, against_revision=self._key_revision or 0)
        if now >= self._renewed_at + self._ttl_s / 3:
            return RenewLease(lease_id=self._lease_id)
        return None

    def next_action_in_s(self, now: float) -> float:
        """Seconds until `next_action` may return an action, if no event comes before."""
        due_at = self._renewed_at + self._ttl_s / 3
        if self.state is ElectionState.STANDBY and self._is_key_free:
            due_at = min(due_at, self._campaign_at)
        return max(0.0, due_at - now)

    def on_granted(self, lease_id: int, asked_at: float) -> None:
        if self.state is ElectionState.NO_LEASE:
            self.state = ElectionState.STANDBY
            self._lease_id, self._renewed_at = lease_id, asked_at

    def on_renewed(self, asked_at: float) -> None:
        self._renewed_at = max(self._renewed_at, asked_at)

    def on_lease_lost(self) -> None:
        """The key was deleted with the lease, or will be before anybody can take it."""
        if self.state is not ElectionState.RESIGNED:
            self.state = ElectionState.NO_LEASE
        self._lease_id = 0

    def on_won(self, revision: int) -> None:
        self._key_revision = max(self._key_revision or 0, revision)
        if self.state is ElectionState.STANDBY:
            self.state, self.leader_revision = ElectionState.LEADING, revision

    def on_not_won(self, now: float) -> None:
        """Another control plane was faster, or the outcome is unknown; the watch will tell."""
        self._campaign_at = now + _CAMPAIGN_BACKOFF_S

    def on_lost_leader(self, revision: int | None) -> bool:
        """The ranks do not hear the leader whose key has that revision; None: they hear it. Whether
        that is news."""
        is_news = revision != self._lost_revision
        self._lost_revision = revision
        return is_news

    def on_key(self, name: str | None, revision: int) -> None:
        """The watch shows the key: the holder's name and the mod revision, or None and 0 if
        absent."""
        self._key_revision = revision
        mine = name == self._name and self._campaigned_lease_id == self._lease_id != 0
        if self.state is ElectionState.LEADING and not (mine and revision == self.leader_revision):
            self.state = ElectionState.STANDBY
        if self.state is ElectionState.STANDBY and mine:  # a campaign whose reply was lost
            self.state, self.leader_revision = ElectionState.LEADING, revision

    def resign(self) -> None:
        self.state = ElectionState.RESIGNED

    def on_revoked(self) -> None:
        self._lease_id = 0
