"""What the failure detector returns: a verdict on a member, or an alarm for a person."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shared.records import Verdict


class AlarmKind(Enum):
    MASS_EXPIRY = "mass_expiry"
    OWN_LINK = "own_link"
    TOO_FEW_SLOTS = "too_few_slots"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that only a person can repair. Raised once per episode."""

    kind: AlarmKind
    detail: str


Judgement = Verdict | Alarm
