"""What the engine thread reports to the rest of its rank during a step: its heartbeat, whom it
waits for, whom it suspects. Implements the exchange's StepMonitor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_worker.engine.mailbox import Inbox, Post, Suspect
from gpu_worker.engine.step_timing import StepTiming
from shared.clock import Clock
from shared.types import Epoch, RankId, Step, SuspicionReason

STEP_PATIENCE_S = 1.5
"""A step that is still under way so long after a planned map has waited long enough is abandoned.
It may be a long one. Or it waits for a rank that leaves and hangs, on which there is no verdict any
more."""


class EngineMonitor:
    """Written by the engine thread, read by the event loop. Each field is replaced whole, so no
    lock is needed."""

    def __init__(
        self, inbox: Inbox, post: Post, clock: Clock, cpu_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        """`cpu_s` gives the CPU seconds that the engine thread has used so far."""
        self.epoch = Epoch(0)
        self.step = Step(0)
        self.num_members = 1
        self._inbox = inbox
        self._post = post
        self._clock = clock
        self._beat_at = clock.now()
        self._waiting_for: Sequence[RankId] = ()
        self._parked = False
        self.timing = StepTiming()
        self._cpu_s = cpu_s
        self._cpu_seen_s = 0.0
        self._cpu_at = self._beat_at

    @property
    def waiting_for(self) -> tuple[RankId, ...]:
        return tuple(self._waiting_for)

    def engine_age_ms(self) -> float:
        """Milliseconds since the engine thread last made progress. 0 while it sleeps on the inbox,
        from which any item wakes it. A long computation passes no heartbeat point but uses CPU
        time, if only a little on a busy host, so CPU time counts as progress."""
        now = self._clock.now()
        if self._parked:
            return 0.0
        used_s = self._cpu_s()
        if used_s > self._cpu_seen_s:
            self._cpu_seen_s, self._cpu_at = used_s, now
        return max(0.0, (now - max(self._beat_at, self._cpu_at)) * 1000)

    def newest_epoch(self) -> Epoch:
        waiting = self._inbox.waiting
        if waiting is not None and self._clock.now() >= waiting.waits_until + STEP_PATIENCE_S:
            self._inbox.end_patience()
        return self._inbox.newest_epoch

    def beat(self, waiting_for: Sequence[RankId]) -> None:
        self._beat_at = self._clock.now()
        self._waiting_for = waiting_for
        at = (self.epoch, self.step)
        self.timing.on_beat(at, waiting_for, self.num_members, self._beat_at)

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        self._post(
            Suspect(rank=rank, reason=reason, epoch=self.epoch, step=self.step, detail=detail)
        )

    def park(self, timeout_s: float) -> None:
        """Sleeps on the inbox, because the engine has no step to run."""
        self._waiting_for = ()
        self.timing.on_sleep()
        self._parked = True
        self._inbox.wait(timeout_s)
        self._beat_at = self._clock.now()
        self._parked = False
