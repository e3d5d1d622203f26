"""Which members of the map are being drained, and when the sessions that are left there move. Pure.

A rank is drained because the desired state says so, or because its own record says that it leaves.
It gets no session while another rank can have it. What it has goes on until the grace time of the
drain is over, then moves (`planned_move`). A rank that only says that it leaves keeps its sessions
until a drain gives it a grace time."""

from __future__ import annotations

import math

from gateway.cluster_view import ClusterView
from shared.desired_state import AfterDrain, DesiredState, Drain
from shared.types import Member


class Drains:
    """Of one gateway. Times are those of its clock's `now`, in seconds."""

    def __init__(self) -> None:
        self._due_at: dict[Member, float] = {}
        self._drains: dict[Member, Drain | None] = {}

    @property
    def members(self) -> frozenset[Member]:
        return frozenset(self._due_at)

    def on_view(self, view: ClusterView, *, now: float, wall: float) -> None:
        """`wall` is the Unix time of `now`. A drain is counted from when it is first seen here, and
        for no longer than from when it was asked for: hosts' clocks differ, and a gateway may have
        just started."""
        drains = draining_members(view)
        self._due_at = {
            member: self._due_at[member]
            if member in self._drains and self._drains[member] == drain
            else _due_at(drain, now, wall)
            for member, drain in drains.items()
        }
        self._drains = drains

    def due(self, now: float) -> list[Member]:
        """Those whose grace time is over, by rank."""
        return sorted(member for member, at in self._due_at.items() if at <= now)

    def next_due_at(self, now: float) -> float | None:
        """When `due` will have one more."""
        later = [at for at in self._due_at.values() if now < at < math.inf]
        return min(later, default=None)


def draining_members(view: ClusterView) -> dict[Member, Drain | None]:
    """The members of the map that are being drained; None: by their own record alone."""
    leaving = {record.member for record in view.ranks.values() if record.leaving}
    found: dict[Member, Drain | None] = {}
    for member in view.members:
        drain = _drain_of(view.desired, member)
        if drain is not None or member in leaving:
            found[member] = drain
    return found


def _drain_of(desired: DesiredState, member: Member) -> Drain | None:
    drain = desired.drain_of(member.rank)
    if drain is None or drain.after is AfterDrain.STAY:
        return drain
    return drain if member.incarnation <= drain.incarnation else None


def _due_at(drain: Drain | None, now: float, wall: float) -> float:
    if drain is None:
        return math.inf
    age_s = max(0.0, wall - drain.requested_at)
    return now + max(0.0, drain.grace_s - age_s)
