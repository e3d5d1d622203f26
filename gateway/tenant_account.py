"""What one client has in flight at this gateway, what it has taken of its rates, and whether its
own limits allow more. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.api_keys import ApiKey
from gateway.token_bucket import TokenBucket
from shared.errors import Overloaded

_SMOOTHING = 0.2
_RETRY_MAX_S = 60.0
_Amount = tuple[str, int, int, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateState:
    """One of a client's rates, as OpenAI's headers tell it."""

    limit: int
    remaining: int
    reset_s: float  # until all of it is there again


class TenantAccount:
    """`requests`, `choices` and `tokens` are in flight."""

    def __init__(self, key: ApiKey, now: float) -> None:
        self.key = key
        self.requests = 0
        self.choices = 0
        self.tokens = 0
        self._request_s = 1.0  # smoothed duration of a request
        self._request_rate = _new_bucket(key.limits.requests_per_minute, now)
        self._token_rate = _new_bucket(key.limits.tokens_per_minute, now)

    def use_key(self, key: ApiKey, now: float) -> None:
        """The key's entry as it is now."""
        if key == self.key:
            return
        self._request_rate = _changed(self._request_rate, key.limits.requests_per_minute, now)
        self._token_rate = _changed(self._token_rate, key.limits.tokens_per_minute, now)
        self.key = key

    def is_idle(self, now: float) -> bool:
        """Whether a new account would be the same."""
        buckets = (self._request_rate, self._token_rate)
        return not self.requests and all(b is None or b.full_in_s(now) == 0 for b in buckets)

    def enter(self, now: float) -> None:
        """One request more. Raises Overloaded."""
        limits = self.key.limits
        self._check_in_flight(("requests", self.requests, 1, limits.requests_max))
        if self._request_rate is not None:
            self._check_rate("requests", self._request_rate, 1, now)
            self._request_rate.take(1, now)
        self.requests += 1

    def check_work(self, *, tokens: int, choices: int, now: float) -> None:
        """Whether a request that has entered may add so much work. Raises Overloaded."""
        limits = self.key.limits
        self._check_in_flight(("choices", self.choices, choices, limits.choices_max))
        self._check_in_flight(("tokens", self.tokens, tokens, limits.tokens_max))
        if self._token_rate is not None:
            self._check_rate("tokens", self._token_rate, tokens, now)

    def add_work(self, *, tokens: int, choices: int, now: float) -> None:
        """Negative numbers correct an estimate."""
        self.tokens += tokens
        self.choices += choices
        if self._token_rate is not None:
            self._token_rate.take(tokens, now)

    def leave(
        self, *, tokens: int, choices: int, tokens_used: int, duration_s: float, now: float
    ) -> None:
        """The request has ended. Of the tokens that were counted against the rate only those that
        it used stay counted."""
        self.requests -= 1
        self.tokens -= tokens
        self.choices -= choices
        assert min(self.requests, self.tokens, self.choices) >= 0
        if self._token_rate is not None:
            self._token_rate.take(min(tokens_used, tokens) - tokens, now)
        self._request_s += _SMOOTHING * (duration_s - self._request_s)

    def request_rate(self, now: float) -> RateState | None:
        return _state(self._request_rate, now)

    def token_rate(self, now: float) -> RateState | None:
        return _state(self._token_rate, now)

    def retry_after_s(self) -> int:
        """Whole seconds, at least one: when one of its requests is likely to end."""
        expected_s = self._request_s / max(1, self.requests)
        return max(1, math.ceil(min(expected_s, _RETRY_MAX_S)))

    def _check_in_flight(self, amount: _Amount) -> None:
        """What is larger than its limit may run if nothing else of the client does."""
        name, used, added, limit = amount
        if limit is None or used + added <= limit or (used == 0 and name != "requests"):
            return
        raise Overloaded(
            f"Rate limit reached for {name} in flight: limit {limit}, used {used}, requested "
            f"{added}. Retry later.",
            retry_after_s=self.retry_after_s(),
            code="rate_limit_exceeded",
        )

    def _check_rate(self, name: str, bucket: TokenBucket, amount: int, now: float) -> None:
        wait_s = bucket.wait_s(amount, now)
        if not wait_s:
            return
        used = round(bucket.per_minute - bucket.level(now))
        raise Overloaded(
            f"Rate limit reached for {name} per minute: limit {bucket.per_minute:g}, used {used}, "
            f"requested {amount}. Retry in {wait_s:.3g} s.",
            retry_after_s=max(1, math.ceil(wait_s)),
            code="rate_limit_exceeded",
        )


def _new_bucket(per_minute: int | None, now: float) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, now)


def _changed(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if bucket is None or per_minute is None:
        return _new_bucket(per_minute, now)
    bucket.change_limit(per_minute, now)
    return bucket


def _state(bucket: TokenBucket | None, now: float) -> RateState | None:
    if bucket is None:
        return None
    return RateState(
        limit=round(bucket.per_minute),
        remaining=max(0, math.floor(bucket.level(now))),
        reset_s=bucket.full_in_s(now),
    )
