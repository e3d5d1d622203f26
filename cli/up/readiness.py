"""Waits until a starting instance serves, and reports its progress."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import aiohttp

from cli.observe.instance_view import InstanceView
from shared.keys import Keys
from shared.records import GatewayRecord
from shared.store import Store
from shared.types import RankState

_POLL_S = 0.2


async def wait_for_map(
    store: Store,
    keys: Keys,
    num_ranks: int,
    on_progress: Callable[[str], None],
    require_alive: Callable[[], None],
) -> str:
    """Waits until a map names registered incarnations of all ranks, and describes it. Raises
    whatever `require_alive` raises."""
    while True:
        require_alive()
        view = InstanceView.of(keys, (await store.get_prefix(keys.root)).values)
        found = view.expert_map
        if found is not None and sum(found.has(r.member) for r in view.ranks) >= num_ranks:
            return f"epoch {found.epoch}, {len(found.members)} ranks"
        ready = sum(record.state is RankState.READY for record in view.ranks)
        leader = "" if view.leader else "; no control plane leads yet"
        on_progress(f"{len(view.ranks)} of {num_ranks} registered, {ready} loaded{leader}")
        await asyncio.sleep(_POLL_S)


async def wait_for_gateways(
    store: Store, keys: Keys, number: int, url: str, require_alive: Callable[[], None]
) -> None:
    """Waits until all are ready, each by itself: which of several a connection to their port `url`
    reaches, nobody can choose. Raises whatever `require_alive` raises."""
    if number == 1:
        await wait_until_healthy(url, require_alive)
        return
    found: list[GatewayRecord] = []
    while len(found) < number:
        require_alive()
        await asyncio.sleep(_POLL_S)
        found = InstanceView.of(keys, (await store.get_prefix(keys.gateways)).values).gateways
    for record in found:
        await wait_until_healthy(record.own_url, require_alive)


async def wait_until_healthy(url: str, require_alive: Callable[[], None]) -> None:
    """Waits until the gateway is ready. Raises whatever `require_alive` raises."""
    timeout = aiohttp.ClientTimeout(total=2.0)
    async with own_gateway_session(timeout) as http:
        while True:
            require_alive()
            try:
                async with http.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_POLL_S)


def own_gateway_session(
    timeout: aiohttp.ClientTimeout, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientSession:
    """For the gateway that this process has started: its certificate, which is made out to the name
    that clients use, proves nothing here."""
    connector = aiohttp.TCPConnector(ssl=False)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)
