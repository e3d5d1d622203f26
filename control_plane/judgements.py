"""What the failure detector returns: a verdict on a member, a standstill, or an alarm; and what may
become of a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from shared.records import Verdict
from shared.types import Epoch, Member, SuspicionReason


class AlarmKind(Enum):
    MASS_EXPIRY = "mass_expiry"
    OWN_LINK = "own_link"
    STANDSTILL = "standstill"
    TOO_FEW_SLOTS = "too_few_slots"
    BELOW_CAPACITY = "below_capacity"
    REBALANCE_STUCK = "rebalance_stuck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that a person should know. Raised once per episode; MASS_EXPIRY and OWN_LINK may
    end by themselves."""

    kind: AlarmKind
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """Members wait for each other, all of them live, and no step moves. A map of the same members
    in which all begin together ends it, unless some cannot reach each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictCancelled:
    """The member was judged because its process was stopped, and it goes on before the verdict is
    written: it lives."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class BadCounts:
    """A member has counted experts that this instance does not have; it is not believed."""

    detail: str


Judgement = Verdict | Alarm | Standstill | VerdictCancelled | BadCounts


def verdicts_on(
    members: Iterable[Member], cause: SuspicionReason, *, epoch: int, now: float
) -> tuple[Verdict, ...]:
    """Nothing speaks against them: somebody asked that they leave, or maps have left them out."""
    return tuple(
        Verdict(
            rank=member.rank,
            incarnation=member.incarnation,
            cause=cause,
            signals=(),
            epoch=Epoch(epoch),
            first_signal_at=now,
            decided_at=now,
        )
        for member in members
    )
