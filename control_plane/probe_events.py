"""What the prober reports about a rank."""

from __future__ import annotations

from dataclasses import dataclass

from shared.types import Member
from shared.wire import ExpertCounts, Pong


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConnected:
    """Connected, and this incarnation answered with Welcome."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeBroken:
    """The other side closed or reset the connection, or sent something malformed."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRefused:
    """Nothing listens at its address any more, or another incarnation does."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePong:
    member: Member
    pong: Pong


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeCounts:
    """What the member has counted of its experts."""

    member: Member
    counts: ExpertCounts


ProbeEvent = ProbeConnected | ProbeBroken | ProbeRefused | ProbePong | ProbeCounts
