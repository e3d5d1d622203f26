"""What the failure detector comes to: a death, or an alarm for a person; and the verdict that says
so in etcd. What follows from a death is membership's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from control_plane.cluster_state import member_of
from shared.records import Suspicion, Verdict
from shared.types import Epoch, Member, SuspicionReason


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredDead:
    """Becomes a Verdict when the map without the member is published."""

    member: Member
    cause: SuspicionReason
    signals: tuple[Suspicion, ...]
    first_signal_at: float
    decided_at: float


class AlarmKind(Enum):
    MASS_EXPIRY = "mass_expiry"
    OWN_LINK = "own_link"
    TOO_FEW_SLOTS = "too_few_slots"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that only a person can mend; said once an episode."""

    kind: AlarmKind
    detail: str


Judgement = DeclaredDead | Alarm


def verdict_of(dead: DeclaredDead, epoch: Epoch) -> Verdict:
    """`epoch`: of the map that leaves the life out."""
    return Verdict(
        rank=dead.member.rank,
        incarnation=dead.member.incarnation,
        cause=dead.cause,
        signals=dead.signals,
        epoch=epoch,
        first_signal_at=dead.first_signal_at,
        decided_at=dead.decided_at,
    )


def declared_dead_of(verdict: Verdict) -> DeclaredDead:
    return DeclaredDead(
        member=member_of(verdict),
        cause=verdict.cause,
        signals=verdict.signals,
        first_signal_at=verdict.first_signal_at,
        decided_at=verdict.decided_at,
    )
