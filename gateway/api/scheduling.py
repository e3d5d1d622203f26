"""Reads for whom and how urgently a request runs: `priority`, `timeout`, `cache_salt`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.api.bodies import GenerationBody
from gateway.api_keys import ApiKey
from gateway.cache_salt import SALT_CHARACTERS_MAX, CacheSalts
from shared.clock import Clock
from shared.errors import RequestError
from shared.types import PRIORITY_MAX, SchedulingParams

TIMEOUT_HEADER = "X-Request-Timeout"
TIMEOUT_MAX_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestScheduling:
    """`expires_at` is of the clock's `now`; infinite if the request has no deadline."""

    params: SchedulingParams
    expires_at: float


def read_scheduling(
    body: GenerationBody,
    timeout_header: str | None,
    *,
    key: ApiKey,
    salts: CacheSalts,
    clock: Clock,
    began_at: float,
) -> RequestScheduling:
    """The time of a request begins when its header has been read. Raises RequestError."""
    timeout_s = _timeout_s(body.timeout, timeout_header)
    expires_at = began_at + timeout_s
    left_s = expires_at - clock.now()
    return RequestScheduling(
        params=SchedulingParams(
            tenant=key.name,
            weight=key.weight,
            priority=_priority(body.priority, key),
            deadline_at=max(0.0, clock.wall() + left_s) if timeout_s < math.inf else 0.0,
            cache_salt=salts.salt_of(key.name, _cache_salt(body.cache_salt)),
        ),
        expires_at=expires_at,
    )


def _priority(wanted: int | None, key: ApiKey) -> int:
    if wanted is None:
        return key.priority
    if not key.priority_min <= wanted <= PRIORITY_MAX:
        raise RequestError(
            f"priority={wanted} is not allowed: this key may ask for {key.priority_min} or more "
            "(lower is served earlier)",
            param="priority",
        )
    return wanted


def _timeout_s(field: float | None, header: str | None) -> float:
    """The field comes before the header. Infinite if there is neither."""
    name, timeout_s = "timeout", field
    if field is None and header is not None:
        name = TIMEOUT_HEADER
        try:
            timeout_s = float(header)
        except ValueError:
            timeout_s = math.nan
    if timeout_s is None:
        return math.inf
    if not 0 < timeout_s <= TIMEOUT_MAX_S:
        raise RequestError(
            f"{name} must be a number of seconds above 0 and at most {TIMEOUT_MAX_S:g}", param=name
        )
    return timeout_s


def _cache_salt(salt: str | None) -> str:
    if salt is None:
        return ""
    if not salt or len(salt) > SALT_CHARACTERS_MAX:
        raise RequestError(
            f"cache_salt must have 1 to {SALT_CHARACTERS_MAX} characters", param="cache_salt"
        )
    return salt
