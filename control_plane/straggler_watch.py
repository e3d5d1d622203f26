"""Which member has held the others up for so long that it should be drained. Pure: what Pongs say
of steps in, a member out.

Theory of operation. All ranks step together, so a slow one slows all of them (`shared.stragglers`).
A member's time as a straggler grows while its steps go on and it is late, and shrinks while it is
not: a short hiccup is forgotten, and a host that is slow for most of the time is not. Time without
steps counts neither way. Who is late is asked once for all Pongs of an interval.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shared.stragglers import stragglers
from shared.types import Epoch, Member, Step
from shared.wire import Load, Pong

_BETWEEN_PONGS_MAX_S = 2.0
"""More than that was a time in which nobody asked."""

_INTERVAL_S = 0.25


@dataclass(slots=True)
class _Known:
    load: Load
    position: tuple[Epoch, Step]
    at: float
    stepped_s: float = 0.0  # within this interval
    late_s: float = 0.0
    late_ms: float = 0.0  # when it was one last


class StragglerWatch:
    """`now` is in monotonic seconds."""

    def __init__(self, drain_after_s: float) -> None:
        """0: nobody is ever overdue."""
        self._drain_after_s = drain_after_s
        self._known: dict[Member, _Known] = {}
        self._interval_ends_at = 0.0

    def on_pong(self, member: Member, pong: Pong, now: float) -> None:
        if not self._drain_after_s:
            return
        position = (pong.epoch, pong.step)
        known = self._known.setdefault(member, _Known(load=pong.load, position=position, at=now))
        if position != known.position:
            known.stepped_s += min(now - known.at, _BETWEEN_PONGS_MAX_S)
        known.load, known.position, known.at = pong.load, position, now
        if now >= self._interval_ends_at:
            self._interval_ends_at = now + _INTERVAL_S
            self._end_interval()

    def overdue(self, members: Collection[Member]) -> tuple[Member, float] | None:
        """The one of these members that has been a straggler for longest, if that is long enough,
        and by how many ms it was late in each step. The others are forgotten."""
        self._known = {m: known for m, known in self._known.items() if m in members}
        slowest = max(self._known, key=self._late_s, default=None)
        if slowest is None or self._late_s(slowest) < self._drain_after_s:
            return None
        return slowest, self._known[slowest].late_ms

    def _late_s(self, member: Member) -> float:
        return self._known[member].late_s

    def _end_interval(self) -> None:
        late_ms = stragglers({member.rank: known.load for member, known in self._known.items()})
        for member, known in self._known.items():
            known.late_ms = late_ms.get(member.rank, known.late_ms)
            late_s = known.stepped_s if member.rank in late_ms else -known.stepped_s
            known.late_s = max(0.0, known.late_s + late_s)
            known.stepped_s = 0.0
