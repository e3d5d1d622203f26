"""Whether the steps of an instance stand still though members wait for each other, and who is to
blame. Pure: it ends nobody, and the failure detector says who is a member."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from control_plane.detector_timings import DetectorTimings
from control_plane.watched_member import WatchedMember
from shared.types import Member

_NAMED_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StoodStill:
    """`is_first`: since a step last completed. Only after that is anybody to blame: whom most wait
    for, unless all wait for all (None)."""

    seconds: float
    is_first: bool
    blamed: WatchedMember | None = None
    waiting: tuple[Member, ...] = ()  # for the one to blame

    @property
    def detail(self) -> str:
        names = ", ".join(str(member) for member in self.waiting[:_NAMED_MAX])
        return f"no step completes for {self.seconds:.1f} s, and {names} wait for it"


class StandstillWatch:
    """All times are in the detector's attentive seconds."""

    def __init__(self, timings: DetectorTimings) -> None:
        self._timings = timings
        self._progress: tuple[int, int] = (0, 0)
        # The time of the last progress, or of the first wait after it: sleeping ranks do not wait.
        self._progress_attentive_s = 0.0
        self._began_together = False  # since a step last completed

    def restart(self, members: Collection[WatchedMember], attentive_s: float) -> None:
        """What the steps have done until now says nothing any more."""
        self._move_to((0, 0), members, attentive_s)

    def on_pong(
        self,
        watched: WatchedMember,
        at_step: tuple[int, int],
        members: Collection[WatchedMember],
        attentive_s: float,
    ) -> bool:
        """`at_step`: epoch and step that a Pong of `watched` has told. Returns whether a step of
        the epoch has completed."""
        epoch, step = at_step
        has_completed = epoch == self._progress[0] and step > self._progress[1]
        if has_completed:
            self._began_together = False
        if at_step > self._progress:
            self._move_to(at_step, members, attentive_s)
        # A member that comes to the newest epoch late could not before: what kept it, as a cut link
        # does, has just ended, and the step may need as long as any from here. Each member comes to
        # an epoch once, so this cannot go on for ever.
        if epoch > watched.epoch and epoch == self._progress[0]:
            self._progress_attentive_s = attentive_s
        watched.epoch = max(watched.epoch, epoch)
        return has_completed

    def look(
        self,
        members: Collection[WatchedMember],
        attentive_s: float,
        is_excused: Callable[[WatchedMember], bool],
    ) -> StoodStill | None:
        """None while they do not stand still, or somebody has announced why they do. After each
        other answer the time begins anew."""
        if not any(w.waiting_for for w in members):
            self._progress_attentive_s = attentive_s
        seconds = attentive_s - self._progress_attentive_s
        if seconds < self._timings.stuck_s:
            return None
        # Old Pongs do not count: the missing progress may be our own lost link.
        heard = [
            w for w in members if attentive_s - w.pong_attentive_s < self._timings.probe_silence_s
        ]
        waits = Counter(rank for w in heard for rank in w.waiting_for)
        accused = [w for w in members if w.accusers and waits[w.member.rank] > 0]
        if not accused or any(is_excused(w) for w in accused):
            return None
        self.restart(members, attentive_s)
        if not self._began_together:
            self._began_together = True
            return StoodStill(seconds=seconds, is_first=True)
        most = max(waits[w.member.rank] for w in accused)
        if all(waits[w.member.rank] == most for w in heard):
            # Who waits for all does not say whom it cannot reach. A death would be a guess.
            return StoodStill(seconds=seconds, is_first=False)
        blamed = next(w for w in accused if waits[w.member.rank] == most)
        waiting = sorted(
            (w.member for w in heard if blamed.member.rank in w.waiting_for), key=lambda m: m.rank
        )
        return StoodStill(seconds=seconds, is_first=False, blamed=blamed, waiting=tuple(waiting))

    def _move_to(
        self, progress: tuple[int, int], members: Collection[WatchedMember], attentive_s: float
    ) -> None:
        self._progress, self._progress_attentive_s = progress, attentive_s
        for watched in members:
            watched.accusers.clear()
