"""What the engine thread lets the rest of its rank know while it steps: that it lives, whom it
waits for, whom it suspects. The exchange's StepMonitor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_worker.engine.mailbox import Inbox, Post, Suspect
from shared.clock import Clock
from shared.types import Epoch, RankId, Step, SuspicionReason


class EngineMonitor:
    """Written by the engine thread, read by the event loop: each field is replaced whole, so no
    lock is needed."""

    def __init__(
        self, inbox: Inbox, post: Post, clock: Clock, cpu_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        """`cpu_s` is the CPU time that the engine thread has used so far."""
        self.epoch = Epoch(0)
        self.step = Step(0)
        self._inbox = inbox
        self._post = post
        self._clock = clock
        self._beat_at = clock.now()
        self._waiting_for: Sequence[RankId] = ()
        self._parked = False
        self._cpu_s = cpu_s
        self._cpu_seen_s = 0.0
        self._cpu_at = self._beat_at

    @property
    def waiting_for(self) -> tuple[RankId, ...]:
        return tuple(self._waiting_for)

    def engine_age_ms(self) -> float:
        """Since the engine thread last showed life. While it sleeps on the inbox it is 0: any item
        wakes it, and nothing but the inbox holds it. In a long computation it passes no heartbeat
        point, but uses CPU time; on a crowded host little of it, and still it lives."""
        now = self._clock.now()
        if self._parked:
            return 0.0
        used_s = self._cpu_s()
        if used_s > self._cpu_seen_s:
            self._cpu_seen_s, self._cpu_at = used_s, now
        return max(0.0, (now - max(self._beat_at, self._cpu_at)) * 1000)

    def newest_epoch(self) -> Epoch:
        return self._inbox.newest_epoch

    def beat(self, waiting_for: Sequence[RankId]) -> None:
        self._beat_at = self._clock.now()
        self._waiting_for = waiting_for

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        self._post(
            Suspect(rank=rank, reason=reason, epoch=self.epoch, step=self.step, detail=detail)
        )

    def park(self, timeout_s: float) -> None:
        """Sleeps on the inbox, which is what the engine does where it has no step to run."""
        self._waiting_for = ()
        self._parked = True
        self._inbox.wait(timeout_s)
        self._beat_at = self._clock.now()
        self._parked = False
