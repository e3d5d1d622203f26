"""Who may act: the leader key under a control plane's own lease. Pure; `leadership` does the I/O.

Theory of operation. The key is taken by a transaction that finds it absent, together with the next
term. Whoever holds it acts only until shortly before its lease *could* expire, counted from the
moment a successful renewal was asked for. Writes are fenced by the key's revision all the same:
this rule only spares futile ones.

    state     | event                        | next      | action
    ----------+------------------------------+-----------+------------------------
    no_lease | begin, lease lost            | no_lease | GrantLease, until granted
    no_lease | granted                      | standby   | Campaign, if the key is absent
    standby   | key gone                     | standby   | Campaign
    standby   | won                          | leading   |
    standby   | not won                      | standby   | Campaign after a pause, if absent
    leading   | key gone, or another's       | standby   | Campaign, if absent
    leading   | renewal late                 | leading   | may not act until renewed
    any       | renewal due                  | same      | RenewLease
    any       | lease lost                   | no_lease | GrantLease
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
    """Take the key, if it is absent still."""

    lease_id: int


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
    """`next_action(now)` names the next action to perform; its outcome comes back as an event."""

    def __init__(self, *, name: str, ttl_s: float) -> None:
        self._name = name
        self._ttl_s = ttl_s
        self._margin_s = ttl_s / 5
        self.state = ElectionState.NO_LEASE
        self.leader_revision = 0
        self._lease_id = 0
        self._renewed_at = 0.0
        self._key_revision: int | None = None  # None: not seen yet; 0: absent
        self._campaigned_lease_id = 0
        self._campaign_at = 0.0

    def may_act(self, now: float) -> bool:
        return (
            self.state is ElectionState.LEADING
            and now < self._renewed_at + self._ttl_s - self._margin_s
        )

    def _may_campaign(self, now: float) -> bool:
        return (
            self.state is ElectionState.STANDBY
            and self._key_revision == 0
            and now >= self._campaign_at
        )

    def next_action(self, now: float) -> Action | None:
        if self.state is ElectionState.RESIGNED:
            return RevokeLease(lease_id=self._lease_id) if self._lease_id else None
        if self.state is ElectionState.NO_LEASE:
            return GrantLease()
        if self._may_campaign(now):
            self._campaigned_lease_id = self._lease_id
            return Campaign(lease_id=self._lease_id)
        if now >= self._renewed_at + self._ttl_s / 3:
            return RenewLease(lease_id=self._lease_id)
        return None

    def next_action_in_s(self, now: float) -> float:
        """How long nothing falls due, unless an event comes."""
        due_at = self._renewed_at + self._ttl_s / 3
        if self.state is ElectionState.STANDBY and self._key_revision == 0:
            due_at = min(due_at, self._campaign_at)
        return max(0.0, due_at - now)

    def on_granted(self, lease_id: int, asked_at: float) -> None:
        if self.state is ElectionState.NO_LEASE:
            self.state = ElectionState.STANDBY
            self._lease_id, self._renewed_at = lease_id, asked_at

    def on_renewed(self, asked_at: float) -> None:
        self._renewed_at = max(self._renewed_at, asked_at)

    def on_lease_lost(self) -> None:
        """The key has gone with it, or will have before anybody can take it."""
        if self.state is not ElectionState.RESIGNED:
            self.state = ElectionState.NO_LEASE
        self._lease_id = 0

    def on_won(self, revision: int) -> None:
        self._key_revision = max(self._key_revision or 0, revision)
        if self.state is ElectionState.STANDBY:
            self.state, self.leader_revision = ElectionState.LEADING, revision

    def on_not_won(self, now: float) -> None:
        """Somebody was quicker, or the outcome is unknown; the watch will tell."""
        self._campaign_at = now + _CAMPAIGN_BACKOFF_S

    def on_key(self, name: str | None, revision: int) -> None:
        """What the watch shows now: whose the key is (None: absent) and its mod revision (0)."""
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
