"""Keeps the lease of a rank that has not registered yet, from when it was granted."""

from __future__ import annotations

import asyncio
import contextlib

from shared.errors import LeaseLost, StoreUnavailable
from shared.keys import Keys
from shared.store import Store
from shared.types import Member

_REGISTER_TIMEOUT_S = 480.0  # a fork server that compiles kernels may need 300


async def keep_lease_until_registered(
    store: Store, keys: Keys, member: Member, lease_id: int, lease_ttl_s: float
) -> None:
    """Renews the lease, because waiting for a fork server or loading a model may take longer than
    its TTL. Ends when the rank's record exists, when the lease is lost, or after a timeout."""
    key = keys.rank(member.rank, member.incarnation)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(contextlib.suppress(LeaseLost, TimeoutError))
        await stack.enter_async_context(asyncio.timeout(_REGISTER_TIMEOUT_S))
        while True:
            await asyncio.sleep(lease_ttl_s / 3)
            with contextlib.suppress(StoreUnavailable):
                await store.keep_alive(lease_id)
                if await store.get(key) is not None:
                    return
