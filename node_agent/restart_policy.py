"""How long a rank waits before its restart: a pure function of how its last incarnations ended."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass

from shared.exit_codes import EXIT_FENCED


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Even the first restart waits a little, because a starting process takes CPU from the
    survivors while they recover."""

    first_delay_s: float = 0.1
    delay_s_max: float = 15.0
    killed_delay_s_max: float = 2.0  # SIGKILL comes from outside: it shows no fault of the rank
    healthy_after_s: float = 20.0  # a run this long resets the count of failures

    def failures_after(self, failures: int, *, uptime_s: float, exit_code: int | None) -> int:
        """The number of short runs in a row, after one that has just ended."""
        if exit_code == EXIT_FENCED or uptime_s >= self.healthy_after_s:
            return 0
        return failures + 1

    def delay_s(self, failures: int, *, exit_code: int | None, jitter: float) -> float:
        """`jitter` in [0, 1) adds up to half of the delay, to spread ranks that died together."""
        if exit_code == EXIT_FENCED:
            return 0.0
        doubled_s = self.first_delay_s * 2.0 ** min(max(failures - 1, 0), 16)
        is_killed = exit_code == -signal.SIGKILL
        most_s = min(self.killed_delay_s_max if is_killed else math.inf, self.delay_s_max)
        return min(doubled_s, most_s) * (1.0 + jitter / 2)
