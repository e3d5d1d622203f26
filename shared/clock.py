"""The clock that is passed to every service, so that tests can replace it. Seconds."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """`now()` is monotonic, for deadlines. `wall()` is Unix time, to show to people."""

    def now(self) -> float: ...

    def wall(self) -> float: ...


class SystemClock:
    """The machine's clocks. CLOCK_MONOTONIC is one clock for all processes of a host, so that
    `now()` values of two processes on one host can be compared."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
