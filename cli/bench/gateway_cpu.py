"""Whether a gateway is what limits a measurement: the CPU time of its event loop's thread, which it
tells at /metrics, over the time that passed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import aiohttp

LIMITING_SHARE = 0.9
"""A thread that runs for this share of the time makes streams wait for it."""

_PROBES = 12
"""Connections that are opened to find all gateways that share the port."""
_COUNTER = re.compile(
    r'^starfish_gateway_event_loop_cpu_seconds_total\{gateway="([^"]*)"\} (\S+)$', re.MULTILINE
)


async def read_gateways_cpu(url: str, headers: Mapping[str, str]) -> dict[str, float]:
    """CPU seconds of the gateways that were met at `url`; those that do not tell are left out."""
    found: dict[str, float] = {}
    connector = aiohttp.TCPConnector(force_close=True)
    timeout = aiohttp.ClientTimeout(total=5.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as http:
        for _ in range(_PROBES):
            try:
                async with http.get(f"{url}/metrics") as response:
                    text = await response.text() if response.status == 200 else ""
            except (aiohttp.ClientError, TimeoutError):
                break
            found |= cpu_seconds_of(text)
    return found


def cpu_seconds_of(metrics: str) -> dict[str, float]:
    """By gateway, in the text of /metrics."""
    return {name: float(value) for name, value in _COUNTER.findall(metrics)}


def busiest_share(
    before: Mapping[str, float], after: Mapping[str, float], took_s: float
) -> float | None:
    """Of a core, that the busiest gateway has used; None if none was met both times."""
    shares = [(after[name] - before[name]) / took_s for name in before.keys() & after.keys()]
    return max(shares, default=None)


def limit_warning(shares: Mapping[int, float | None]) -> str | None:
    """Which concurrencies, by the gateway's share of a core at each, measure the gateway."""
    limited = {n: share for n, share in shares.items() if share and share >= LIMITING_SHARE}
    if not limited:
        return None
    where = ", ".join(f"{n} ({share:.0%} of a core)" for n, share in limited.items())
    return (
        f"the gateway is what limits at concurrency {where}: the ranks can do more; start more "
        "gateways (starfish up --gateways N)"
    )
