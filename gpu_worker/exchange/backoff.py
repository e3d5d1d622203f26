"""How an engine thread waits: it first yields the CPU and later sleeps, so that neither a slow peer
on the same cores nor a dead one costs a core."""

from __future__ import annotations

import ctypes
import os
import time

from shared.clock import Clock

_YIELD_S = 100e-6
"""How long a wait yields the CPU before it starts to sleep. A longer time is faster only on idle
cores: if ranks share cores, a waiting rank takes CPU time from those it waits for."""

_SLEEP_S_MIN, _SLEEP_S_MAX, _SLEEP_GROWTH = 30e-6, 200e-6, 1.1
_MAINTENANCE_INTERVAL_S = 0.001
_PR_SET_TIMERSLACK, _TIMER_SLACK_NS = 29, 1000


class Backoff:
    """One wait."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sleep_from = clock.now() + _YIELD_S
        self._maintenance_due_at = 0.0
        self._sleep_s = _SLEEP_S_MIN

    def wait_once(self) -> bool:
        """Yields or sleeps once. True about once a millisecond, when periodic maintenance is
        due."""
        now = self._clock.now()
        if now < self._sleep_from:
            os.sched_yield()
        else:
            time.sleep(self._sleep_s)
            self._sleep_s = min(self._sleep_s * _SLEEP_GROWTH, _SLEEP_S_MAX)
        if now < self._maintenance_due_at:
            return False
        self._maintenance_due_at = now + _MAINTENANCE_INTERVAL_S
        return True


def reduce_timer_slack() -> None:
    """Reduces the calling thread's timer slack to 1 µs. By default Linux may lengthen each sleep by
    50 µs, which is much here."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)
