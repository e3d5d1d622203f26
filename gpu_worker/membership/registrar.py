"""What this rank says in etcd: leased keys, the newest value of each, written again under a new
lease if the old one is lost. It decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import structlog

from shared.errors import LeaseLost, StoreUnavailable
from shared.store import Store

log = structlog.get_logger()

RETRY_MIN_S = 0.1
RETRY_MAX_S = 1.0
LATER_S = 0.2
KEEP_ALIVE_RETRY_S = 0.3
"""Short: whoever comes back from an outage of etcd without a lease is under suspicion."""


class Registrar:
    """`put` returns at once; `run` writes. A value that is overtaken before it was written is never
    written."""

    def __init__(self, store: Store, *, lease_id: int, lease_ttl_s: float) -> None:
        self._store = store
        self._lease_id = lease_id
        self._lease_ttl_s = lease_ttl_s
        self._dirty: dict[str, bytes | None] = {}
        self._wake = asyncio.Event()
        self._doubted = asyncio.Event()

    @property
    def lease_id(self) -> int:
        return self._lease_id

    def put(self, key: str, value: bytes, *, urgent: bool = True) -> None:
        """Not urgent: what nobody waits for is written LATER_S later, because at a death all ranks
        have something to say, and the survivors' next step waits for the same CPUs."""
        self._mark(key, value, urgent)

    def delete(self, key: str) -> None:
        self._mark(key, None, False)

    def _mark(self, key: str, value: bytes | None, urgent: bool) -> None:
        self._dirty.pop(key, None)
        self._dirty[key] = value
        if urgent:
            self._wake.set()
        else:
            asyncio.get_running_loop().call_later(LATER_S, self._wake.set)

    async def run(self) -> None:
        """Writes what is dirty, oldest first, for ever."""
        retry_s = RETRY_MIN_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                key, value = next(iter(self._dirty.items()))
                if await self._write(key, value):
                    retry_s = RETRY_MIN_S
                    if key in self._dirty and self._dirty[key] is value:
                        del self._dirty[key]
                else:
                    await asyncio.sleep(retry_s * random.uniform(0.5, 1.5))
                    retry_s = min(retry_s * 2, RETRY_MAX_S)

    def doubt_lease(self) -> None:
        """Something speaks against it: `keep_alive` asks etcd now."""
        self._doubted.set()

    async def keep_alive(self, lost: Callable[[], None]) -> None:
        """Refreshes the lease three times per TTL; calls `lost` once for each that is gone though
        etcd answers."""
        lost_id, wait_s = 0, self._lease_ttl_s / 3
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._doubted.wait()
            self._doubted.clear()
            wait_s = self._lease_ttl_s / 3
            lease_id = self._lease_id
            try:
                await self._store.keep_alive(lease_id)
            except LeaseLost:
                if lease_id != lost_id:
                    log.warning("lease_lost", lease_id=lease_id)
                    lost_id = lease_id
                    lost()
            except StoreUnavailable as error:
                log.warning("keep_alive_failed", detail=str(error))
                wait_s = min(wait_s, KEEP_ALIVE_RETRY_S)

    async def renew(self) -> int:
        """A new lease in place of a lost one; later writes go under it."""
        retry_s = RETRY_MIN_S
        while True:
            try:
                self._lease_id = await self._store.grant_lease(self._lease_ttl_s)
                return self._lease_id
            except StoreUnavailable:
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.5))
                retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def _write(self, key: str, value: bytes | None) -> bool:
        try:
            if value is None:
                await self._store.delete(key)
            else:
                await self._store.put(key, value, lease_id=self._lease_id)
        except LeaseLost:
            self.doubt_lease()  # everything is put again under the next one
            return False
        except StoreUnavailable as error:
            log.warning("put_failed", key=key, detail=str(error))
            return False
        return True
