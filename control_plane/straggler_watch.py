"""Which member has held the others up for so long that it should be drained. Pure: what Pongs say
of steps in, a member out.

Theory of operation. All ranks step together, so a slow one slows all of them (`shared.stragglers`).
A member's time as a straggler grows while its steps go on and it is late, and shrinks while it is
not: a short hiccup is forgotten, and a host that is slow for most of the time is not. Time without
steps counts neither way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shared.stragglers import stragglers
from shared.types import Epoch, Member, Step
from shared.wire import Load, Pong

_BETWEEN_PONGS_MAX_S = 2.0
"""More than that was a time in which nobody asked."""


@dataclass(slots=True)
class _Known:
    load: Load
    position: tuple[Epoch, Step]
    at: float
    late_s: float = 0.0


class StragglerWatch:
    """`now` is in monotonic seconds."""

    def __init__(self, drain_after_s: float) -> None:
        """0: nobody is ever overdue."""
        self._drain_after_s = drain_after_s
        self._known: dict[Member, _Known] = {}

    def on_pong(self, member: Member, pong: Pong, now: float) -> None:
        if not self._drain_after_s:
            return
        position = (pong.epoch, pong.step)
        known = self._known.get(member)
        if known is None:
            self._known[member] = _Known(load=pong.load, position=position, at=now)
            return
        is_stepping = position != known.position
        elapsed_s = min(now - known.at, _BETWEEN_PONGS_MAX_S)
        known.load, known.position, known.at = pong.load, position, now
        if is_stepping:
            late_s = elapsed_s if self._late_ms(member) else -elapsed_s
            known.late_s = max(0.0, known.late_s + late_s)

    def overdue(self, members: Collection[Member]) -> tuple[Member, float] | None:
        """The one of these members that has been a straggler for longest, if that is long enough,
        and by how many ms it is late in each step. The others are forgotten."""
        self._known = {m: known for m, known in self._known.items() if m in members}
        slowest = max(self._known, key=self._late_s, default=None)
        if slowest is None or self._late_s(slowest) < self._drain_after_s:
            return None
        return slowest, self._late_ms(slowest)

    def _late_s(self, member: Member) -> float:
        return self._known[member].late_s

    def _late_ms(self, member: Member) -> float:
        """0 if it is no straggler."""
        loads = {m.rank: known.load for m, known in self._known.items()}
        return stragglers(loads).get(member.rank, 0.0)
