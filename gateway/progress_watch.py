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
        # Of those that do not answer: where each other rank was when it first said so since then.
        self._silent: dict[Member, dict[Member, tuple[Epoch, Step]]] = {}

    def on_report(self, member: Member, epoch: Epoch, step: Step, load: Load, now: float) -> None:
        """A rank's tokens or its answer to a probe have come."""
        known = self._ranks.get(member)
        if known is None:
            self._ranks[member] = _Progress(epoch, step, now)
        elif (epoch, step) != (known.epoch, known.step) or not (load.running or load.waiting):
            known.epoch, known.step, known.moved_at = epoch, step, now
        for silent, began in self._silent.items():
            if silent != member:
                began.setdefault(member, (epoch, step))

    def forget(self, member: Member) -> None:
        self._ranks.pop(member, None)
        self._silent.pop(member, None)
        for began in self._silent.values():
            began.pop(member, None)

    @property
    def has_silent(self) -> bool:
        return bool(self._silent)

    def on_silent(self, members: Iterable[Member]) -> None:
        """These leave a probe unanswered for long enough that whoever can has answered it; all
        others answer."""
        self._silent = {member: self._silent.get(member, {}) for member in members}

    def is_left_behind(self, member: Member) -> bool:
        """Whether some other rank has finished several steps of this one's epoch, and said so at
        both ends, since this one is silent. It could not without it: it works, and only the way
        from there is cut. What others did before that they first tell of it now says nothing: they
        may have been silent themselves, and this one may stand still since long."""
        known = self._ranks.get(member)
        if known is None:
            return False
        for other, (epoch, step) in self._silent.get(member, {}).items():
            now = self._ranks[other]
            if epoch == known.epoch == now.epoch and now.step >= step + _STEPS_AHEAD_MIN:
                return True
        return False

    def stands_still_since(self, member: Member, now: float, *, after_s: float) -> float | None:
        """When it last moved, if that is at least `after_s` ago and it has work; else None."""
        known = self._ranks.get(member)
        if known is None or now - known.moved_at < after_s:
            return None
        return known.moved_at
