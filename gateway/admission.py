"""Admission: how many tokens and sessions this gateway accepts at once. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.errors import Overloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """`tokens_max` bounds prompt + max_tokens of all sessions in flight."""

    tokens_max: int
    sessions_max: int


class Admission:
    """A full gateway rejects a request and never queues it: a client that retries costs nothing."""

    _SMOOTHING = 0.2
    _RETRY_MAX_S = 30.0

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._session_s = 1.0  # smoothed duration of a session
        self.tokens = 0
        self.sessions = 0

    def admit(self, *, tokens: int, sessions: int = 1) -> None:
        """Admits a request; the caller must `release` it once. A request that is larger than the
        whole budget is admitted if no other is in flight. Raises Overloaded."""
        limits = self._limits
        if self.sessions + sessions > limits.sessions_max and self.sessions:
            raise Overloaded(
                f"{self.sessions} requests are in flight, and the limit is {limits.sessions_max}; "
                "retry later",
                retry_after_s=self.retry_after_s(),
            )
        if self.tokens + tokens > limits.tokens_max and self.sessions:
            raise Overloaded(
                f"{self.tokens} tokens are in flight and this request may add {tokens}, "
                f"but the limit is {limits.tokens_max}; retry later",
                retry_after_s=self.retry_after_s(),
            )
        self.tokens += tokens
        self.sessions += sessions

    def release(self, *, tokens: int, sessions: int = 1, duration_s: float) -> None:
        self.tokens -= tokens
        self.sessions -= sessions
        assert self.tokens >= 0
        assert self.sessions >= 0
        self._session_s += self._SMOOTHING * (duration_s - self._session_s)

    def retry_after_s(self) -> int:
        """Whole seconds, at least one: about the time in which a tenth of the sessions end."""
        return max(1, math.ceil(min(self._session_s / 10, self._RETRY_MAX_S)))
