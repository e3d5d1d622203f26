"""What the failure detector comes to: a death, or an alarm for a person. What follows from a death
is membership's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shared.records import Suspicion
from shared.types import Member, SuspicionReason


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
