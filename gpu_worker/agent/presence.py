"""The agent's own lease and record in etcd, kept alive, and written anew where they were lost."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from shared.errors import LeaseLost, StoreUnavailable
from shared.keys import Keys
from shared.records import AgentRecord, pack_record
from shared.store import Store

log = structlog.get_logger()


class Presence:
    """`open` once, then `keep` as a task. The lease's id is 0 before."""

    def __init__(self, store: Store, keys: Keys, record: AgentRecord, lease_ttl_s: float) -> None:
        self._store = store
        self._key = keys.agent(record.node)
        self._record = record
        self._lease_ttl_s = lease_ttl_s
        self._lease_id = 0

    @property
    def lease_id(self) -> int:
        return self._lease_id

    async def open(self) -> None:
        """Raises StoreUnavailable."""
        self._lease_id = await self._store.grant_lease(self._lease_ttl_s)
        await self._store.put(self._key, pack_record(self._record), lease_id=self._lease_id)

    async def keep(self) -> None:
        while True:
            await asyncio.sleep(self._lease_ttl_s / 3)
            try:
                await self._store.keep_alive(self._lease_id)
            except LeaseLost:
                log.warning("agent_lease_lost")
                with contextlib.suppress(StoreUnavailable, LeaseLost):
                    await self.open()
            except StoreUnavailable as error:
                log.warning("keep_alive_failed", detail=str(error))

    async def close(self) -> None:
        with contextlib.suppress(StoreUnavailable):
            await self._store.revoke_lease(self._lease_id)
