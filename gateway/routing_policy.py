"""The policies of --routing: each picks a session's rank among ranks that are equally fit for it
(`rank_choice` sees to that). Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from shared.types import Member, RoutingPolicyName

CACHED_TOKEN_WEIGHT = 2
"""How many more tokens of work a rank may have than another, per prompt token that it has cached.
More than one, because most of a rank's tokens only occupy its KV cache while others are computed.
Not much more, so that a prefix that every client uses is soon computed on a second rank and a third
one too, and does not overload the first."""


class Candidate(NamedTuple):
    """A rank that a session may get. `spared_tokens` of the session need not be computed there:
    they are in its prefix cache or, if it `is_backup`, in the session's KV replicas."""

    member: Member
    work_tokens: int
    spared_tokens: int
    is_backup: bool

    def cost(self) -> tuple[int, Member]:
        """Its work after subtracting what it spares; the rank's number settles a tie."""
        return self.work_tokens - CACHED_TOKEN_WEIGHT * self.spared_tokens, self.member


class RoutingPolicy(Protocol):
    """`pick` gets at least one candidate, in the order of their ranks. Where a policy does not read
    prefixes, only a backup rank spares tokens."""

    @property
    def reads_prefixes(self) -> bool: ...

    def pick(self, candidates: Sequence[Candidate]) -> Candidate: ...


class PrefixAffinity:
    """The rank with the least work, less what its prefix cache saves."""

    reads_prefixes = True

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        return min(candidates, key=Candidate.cost)


class LeastTokens:
    """The rank with the least work, wherever a prompt's prefix is cached."""

    reads_prefixes = False

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        return min(candidates, key=Candidate.cost)


class PowerOfTwo:
    """The one of two random ranks with less work. Several gateways that know the same loads then do
    not all choose the same rank. A session's backup rank is compared with both."""

    reads_prefixes = False

    def __init__(self, numbers: random.Random) -> None:
        self._numbers = numbers

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        drawn = self._numbers.sample(candidates, min(2, len(candidates)))
        return min([*drawn, *(c for c in candidates if c.is_backup)], key=Candidate.cost)


class RoundRobin:
    """One rank after the other, whatever they do; a moved session goes to its backup rank."""

    reads_prefixes = False

    def __init__(self) -> None:
        self._last: Member | None = None

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        for candidate in candidates:
            if candidate.is_backup:
                return candidate
        last = self._last
        after = (c for c in candidates if last is not None and c.member > last)
        chosen = next(after, candidates[0])
        self._last = chosen.member
        return chosen


def routing_policy(name: str, numbers: random.Random) -> RoutingPolicy:
    """Raises ValueError for a name that is not in ROUTING_POLICIES."""
    match RoutingPolicyName(name):
        case RoutingPolicyName.PREFIX_AFFINITY:
            return PrefixAffinity()
        case RoutingPolicyName.LEAST_TOKENS:
            return LeastTokens()
        case RoutingPolicyName.POWER_OF_TWO:
            return PowerOfTwo(numbers)
        case RoutingPolicyName.ROUND_ROBIN:
            return RoundRobin()
