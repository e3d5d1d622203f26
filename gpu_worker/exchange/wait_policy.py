"""The rules of a wait for peers, for every implementation of the exchange. A wait ends with data or
with a newer epoch; a passed deadline only raises a suspicion. The deadline follows the steps that
this rank has seen. Does not wait itself."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_worker.exchange.interface import StepMonitor
from gpu_worker.exchange.step_deadline import StepDeadline
from shared.clock import Clock
from shared.errors import StepAbandoned
from shared.types import Epoch, RankId, Step, SuspicionReason

OWN_PAUSE_S = 0.05
"""A rank that has not looked for so long did not run itself: it accuses nobody of being late."""


class WaitPolicy:
    """One rank's waits within its current step."""

    def __init__(self, monitor: StepMonitor, clock: Clock, exchange_deadline_ms: float) -> None:
        self._monitor = monitor
        self._clock = clock
        self._deadline = StepDeadline(exchange_deadline_ms)
        self._began_at = 0.0
        self._waited_until: float | None = None  # the end of the last wait of this step
        self._looked_at = 0.0
        self._epoch = Epoch(0)
        self._step = Step(0)
        self._late_at = 0.0
        self._suspected: set[tuple[RankId, SuspicionReason]] = set()

    def begin_step(self, epoch: Epoch, step: Step) -> None:
        if self._waited_until is not None:
            self._deadline.on_committed(1000 * (self._waited_until - self._began_at))
        self._began_at, self._waited_until = self._clock.now(), None
        self._epoch = epoch
        self._step = step
        self._suspected.clear()

    def begin_wait(self) -> None:
        self._looked_at = self._clock.now()
        self._late_at = self._looked_at + self._deadline.ms / 1000

    @property
    def is_late(self) -> bool:
        """Whether the present wait was beyond the deadline when it was last watched."""
        return self._looked_at >= self._late_at

    def end_wait(self) -> None:
        self._waited_until = self._clock.now()
        self._monitor.beat(())

    def check_epoch(self) -> None:
        """Raises StepAbandoned if a newer map has reached this rank."""
        newest = self._monitor.newest_epoch()
        if newest > self._epoch:
            self._waited_until = (
                None  # a step that is thrown away says nothing of how long one takes
            )
            raise StepAbandoned(f"epoch {newest} overtook step {self._step} of {self._epoch}")

    def watch(self, waiting_for: Sequence[RankId]) -> None:
        """To be called repeatedly during a wait. Raises StepAbandoned."""
        self.check_epoch()
        self._monitor.beat(waiting_for)
        now = self._clock.now()
        if now - self._looked_at > OWN_PAUSE_S:
            self._late_at = now + self._deadline.ms / 1000
        self._looked_at = now
        if now >= self._late_at:
            for rank in waiting_for:
                self.suspect(rank, SuspicionReason.EXCHANGE, "no data within the exchange deadline")

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        """Raises at most one suspicion for each peer, reason and step. A broken link is reported
        also of a peer that is late: it must be opened again."""
        if (rank, reason) in self._suspected:
            return
        self._suspected.add((rank, reason))
        self._monitor.suspect(rank, reason, f"step {self._step} of epoch {self._epoch}: {detail}")
