"""OpenAI's `x-ratelimit-*` headers: what a client has left of its own rates."""

from __future__ import annotations

import math

from aiohttp import web

from gateway.api.request_context import context_of
from gateway.tenant_account import RateState, TenantAccount
from shared.clock import Clock

RATES = ("requests", "tokens")


class RateHeaders:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def add(self, request: web.Request, response: web.StreamResponse) -> None:
        """For `on_response_prepare`. A stream has them too: they say what holds at its start."""
        context = context_of(request)
        if context is not None and context.account is not None:
            response.headers.update(rate_headers(context.account, self._clock.now()))


def rate_headers(account: TenantAccount, now: float) -> dict[str, str]:
    """None for a rate without a limit."""
    headers: dict[str, str] = {}
    states = (account.request_rate(now), account.token_rate(now))
    for name, rate in zip(RATES, states, strict=True):
        if rate is not None:
            headers |= _headers_of(name, rate)
    return headers


def _headers_of(name: str, rate: RateState) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(rate.limit),
        f"x-ratelimit-remaining-{name}": str(rate.remaining),
        f"x-ratelimit-reset-{name}": duration_text(rate.reset_s),
    }


def duration_text(seconds: float) -> str:
    """As OpenAI spells it: 20ms, 1.5s, 6m0s."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    text = f"{rest_ms / 1000:g}s"
    return f"{minutes}m{text}" if minutes else text
