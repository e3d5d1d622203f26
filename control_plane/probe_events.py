"""What the prober sees of a rank: the vocabulary between it and the failure detector."""

from __future__ import annotations

from dataclasses import dataclass

from shared.types import Member
from shared.wire import Pong


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConnected:
    """Connected, and welcomed by this very incarnation."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeBroken:
    """A connection that stood was closed or reset by the other side."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRefused:
    """Nobody listens at its address any more, or somebody else does."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePong:
    member: Member
    pong: Pong


ProbeEvent = ProbeConnected | ProbeBroken | ProbeRefused | ProbePong
