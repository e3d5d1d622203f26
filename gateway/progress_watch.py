"""Whether ranks go on: when each of them last finished a step, or had nothing to do. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared.types import Epoch, Member, Step
from shared.wire import Load

_STEPS_AHEAD_MIN = 3
"""A rank that has just stopped may have done its part of a step of which nobody heard, and others
may have begun the next one."""


@dataclass(slots=True)
class _Progress:
    epoch: Epoch
    step: Step
    moved_at: float


class ProgressWatch:
    """Ranks step together, so one that waits for a dead peer stands still although it answers
    probes. Times are those of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._ranks: dict[Member, _Progress] = {}
        self._asked_at: dict[Member, tuple[Epoch, Step]] = {}  # the newest step of any rank then

    def on_report(self, member: Member, epoch: Epoch, step: Step, load: Load, now: float) -> None:
        """A rank's tokens or its answer to a probe have come."""
        known = self._ranks.get(member)
        if known is None:
            self._ranks[member] = _Progress(epoch, step, now)
        elif (epoch, step) != (known.epoch, known.step) or not (load.running or load.waiting):
            known.epoch, known.step, known.moved_at = epoch, step, now

    def forget(self, member: Member) -> None:
        self._ranks.pop(member, None)
        self._asked_at.pop(member, None)

    def on_asked(self, members: Iterable[Member]) -> None:
        """These have no probe to answer, or since a moment, in which others have answered theirs:
        what is known of them may have been old."""
        newest = max(((rank.epoch, rank.step) for rank in self._ranks.values()), default=None)
        if newest is not None:
            self._asked_at.update(dict.fromkeys(members, newest))

    def is_left_behind(self, member: Member) -> bool:
        """Whether others have finished several steps of one epoch since it was asked, and since
        anything was heard of it. They could not without it: it works, and only the way from there
        is cut. What they did between its last word and the question says nothing: it may stand
        still since then."""
        known = self._ranks.get(member)
        if known is None:
            return False
        then = known.epoch, known.step
        epoch, step = max(then, self._asked_at.get(member, then))
        return known.epoch == epoch and any(
            other.epoch == epoch and other.step >= step + _STEPS_AHEAD_MIN
            for other in self._ranks.values()
        )

    def stands_still_since(self, member: Member, now: float, *, after_s: float) -> float | None:
        """When it last moved, if that is at least `after_s` ago and it has work; else None."""
        known = self._ranks.get(member)
        if known is None or now - known.moved_at < after_s:
            return None
        return known.moved_at
