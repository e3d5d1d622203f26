"""What the failure detector returns: a verdict on a member, or an alarm."""

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
    """Something that a person should know. Raised once per episode; MASS_EXPIRY and OWN_LINK may
    end by themselves."""

    kind: AlarmKind
    detail: str


Judgement = Verdict | Alarm
