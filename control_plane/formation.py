"""Who forms a map out of nothing, when, and what each of them is to hold. Pure: `Membership` asks
while no map can serve, and performs the answer.

Theory of operation. There is no map yet, or its members are dead, or the survivors' slots cannot
hold all experts. Ranks register one after the other. Those that are there form a map as soon as

    1. they can hold every expert, and all ranks that are wanted have come, or no further one has
       for the grace time, or the window is over: each gets an assignment;
    2. all with an assignment have loaded it and are linked; or some of them are, those hold every
       expert, and the grace time has passed since.

The grace is short after an outage, because streams wait, and longer for the first map of an
instance, where it saves a second placement. It counts ranks, not incarnations: one that dies at
every start delays nobody. Once the assigned ranks are meant to hold every expert, those that come
later change nothing and join the map afterwards. If one of the assigned dies, the others keep what
they have, so that deaths one after the other do not make everybody load from the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control_plane.plans import plan_formation, plan_what_is_missing
from control_plane.residency import Residency
from shared.expert_map import Placement
from shared.types import Member, RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class FormationPolicy:
    grace_s: float = 1.0  # after an outage
    first_grace_s: float = 5.0  # for the first map of an instance
    window_s: float = 30.0  # ranks that keep coming delay a map for this long at most
    survive: int = 1  # see MembershipPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What members hold, or are to hold."""

    by_member: dict[Member, Placement]


class AssignRows(Rows):
    """To be assigned: they are new, or differ from what was assigned before."""


class PublishRows(Rows):
    """Resident, linked, and complete: the map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TooFewSlots:
    num_unplaced: int
    num_ranks: int


FormationStep = AssignRows | PublishRows | TooFewSlots


class Formation:
    """Call `next_step` whenever a map has to be formed, and `end` when one serves."""

    def __init__(self, policy: FormationPolicy) -> None:
        self._policy = policy
        self._began_at: float | None = None
        self._ranks: set[RankId] = set()
        self._last_rank_at = 0.0
        self._complete_since: float | None = None

    def end(self) -> None:
        self._began_at = self._complete_since = None
        self._ranks.clear()

    def next_step(
        self,
        residency: Residency,
        survivors: Sequence[Member],
        newcomers: Sequence[Member],
        now: float,
    ) -> FormationStep | None:
        """`survivors` are the live members of the present map, which the next one must contain.
        None: nothing can be done but wait."""
        candidates = sorted({*survivors, *newcomers})
        self._note(candidates, now)
        if not candidates or any(m not in residency.state.records for m in survivors):
            return None  # a survivor without a record registers again, or is judged dead
        assigned = [m for m in candidates if m in residency.state.assignments]
        if set(survivors) <= set(assigned) and residency.covers(residency.intended_rows(assigned)):
            return self._publish(residency, survivors, assigned, now)
        self._complete_since = None
        if not self._is_due(residency, now):
            return None
        return self._assign(residency, candidates)

    def _note(self, candidates: Sequence[Member], now: float) -> None:
        ranks = {m.rank for m in candidates}
        if ranks and self._began_at is None:
            self._began_at = now
        if ranks - self._ranks:
            self._ranks |= ranks
            self._last_rank_at = now

    def _is_due(self, residency: Residency, now: float) -> bool:
        began_at = self._began_at if self._began_at is not None else now
        return (
            len(self._ranks) >= residency.num_awaited
            or now - self._last_rank_at >= self._grace_s(residency)
            or now - began_at >= self._policy.window_s
        )

    def _grace_s(self, residency: Residency) -> float:
        is_first = residency.state.expert_map is None
        return self._policy.first_grace_s if is_first else self._policy.grace_s

    def _publish(
        self,
        residency: Residency,
        survivors: Sequence[Member],
        assigned: Sequence[Member],
        now: float,
    ) -> PublishRows | None:
        ready = _ready_and_linked(residency, assigned)
        rows = residency.available_rows(ready)
        if not set(survivors) <= set(ready) or not residency.covers(rows):
            self._complete_since = None
            return None
        if self._complete_since is None:
            self._complete_since = now
        waited_s = now - self._complete_since
        if len(ready) < len(assigned) and waited_s < self._grace_s(residency):
            return None
        return PublishRows(by_member=rows)

    def _assign(
        self, residency: Residency, candidates: Sequence[Member]
    ) -> AssignRows | TooFewSlots:
        wanted = plan_what_is_missing(residency, {m: _held(residency, m) for m in candidates})
        if wanted is None:
            plan = plan_formation(residency, candidates, survive=self._policy.survive)
            if plan.unplaced_experts:
                return TooFewSlots(
                    num_unplaced=len(plan.unplaced_experts), num_ranks=len(candidates)
                )
            wanted = {m: residency.widen(plan.placement[:, m.rank]) for m in candidates}
        return AssignRows(
            by_member={
                m: row
                for m, row in wanted.items()
                if (assigned := residency.assigned(m)) is None or (assigned != row).any()
            }
        )


def _held(residency: Residency, member: Member) -> Placement:
    """What it is meant to hold, or, if it was told nothing yet, what it has brought with it."""
    resident = residency.resident(member)
    expert_map = residency.expert_map
    is_new = residency.assigned(member) is None and not (expert_map and expert_map.has(member))
    return resident if is_new and resident is not None else residency.intended(member)


def _ready_and_linked(residency: Residency, members: Sequence[Member]) -> list[Member]:
    """Those that have loaded their assignments, less those that lack a link to an earlier one."""
    result: list[Member] = []
    for member in members:
        if residency.is_ready(member) and residency.are_linked([*result, member]):
            result.append(member)
    return result
