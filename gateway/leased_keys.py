"""What this gateway says in etcd, under one lease: the newest value of each key, written again
under a new lease if the old one is lost. Serving never waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import random

import structlog

from shared.clock import Clock
from shared.errors import LeaseLost, StoreError
from shared.store import Store

log = structlog.get_logger()

RETRY_MIN_S = 0.1
RETRY_MAX_S = 0.5


class LeasedKeys:
    """`put` and `delete` say what shall stand; `run` makes it so."""

    def __init__(self, *, store: Store, ttl_s: float, clock: Clock) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._clock = clock
        self._wanted: dict[str, bytes] = {}
        self._dirty: set[str] = set()
        self._changed = asyncio.Event()
        self._lease_id = 0

    def put(self, key: str, value: bytes) -> None:
        self._wanted[key] = value
        self._mark(key)

    def delete(self, key: str) -> None:
        if self._wanted.pop(key, None) is not None:
            self._mark(key)

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = RETRY_MIN_S
        while True:
            try:
                await self._hold()
            except LeaseLost:
                log.warning("lease_lost", lease_id=self._lease_id)
                self._lease_id = 0
                retry_s = RETRY_MIN_S
            except StoreError as error:
                log.warning("etcd_unavailable", detail=str(error))
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.5))
                retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def release(self) -> None:
        """Takes everything back at once, at the end; best effort."""
        if self._lease_id:
            with contextlib.suppress(StoreError):
                await self._store.revoke_lease(self._lease_id)

    def _mark(self, key: str) -> None:
        self._dirty.add(key)
        self._changed.set()

    async def _hold(self) -> None:
        """Goes on with the lease where there is one: an etcd that was away may still know it."""
        if not self._lease_id:
            self._lease_id = await self._store.grant_lease(self._ttl_s)
            self._dirty |= set(self._wanted)
        renew_at = self._clock.now()
        while True:
            await self._flush()
            if self._clock.now() >= renew_at:
                await self._store.keep_alive(self._lease_id)
                renew_at = self._clock.now() + self._ttl_s / 3
            await self._wait_for_change(renew_at - self._clock.now())

    async def _flush(self) -> None:
        self._changed.clear()
        while self._dirty:
            key = next(iter(self._dirty))
            value = self._wanted.get(key)
            if value is None:
                await self._store.delete(key)
            else:
                await self._store.put(key, value, lease_id=self._lease_id)
            if self._wanted.get(key) is value:
                self._dirty.discard(key)

    async def _wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._changed.wait()
