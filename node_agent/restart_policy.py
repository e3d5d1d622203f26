"""How long a rank stays dead: a pure function of how its last incarnations ended."""

from __future__ import annotations

from dataclasses import dataclass

from shared.exit_codes import EXIT_FENCED


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """The first restart waits, too: a process that starts takes CPU from the survivors in the very
    moment in which they recover."""

    first_delay_s: float = 0.5
    delay_s_max: float = 15.0
    healthy_after_s: float = 20.0  # a run this long clears the record of failures

    def failures_after(self, failures: int, *, uptime_s: float, exit_code: int | None) -> int:
        """How many short runs in a row there were, with one that has just ended."""
        if exit_code == EXIT_FENCED or uptime_s >= self.healthy_after_s:
            return 0
        return failures + 1

    def delay_s(self, failures: int, *, exit_code: int | None, jitter: float) -> float:
        """`jitter` in [0, 1) spreads ranks that died together over half of the delay."""
        if exit_code == EXIT_FENCED:
            return 0.0
        doubled_s = self.first_delay_s * 2.0 ** min(max(failures - 1, 0), 16)
        return min(doubled_s, self.delay_s_max) * (1.0 + jitter / 2)
