"""The keys that a process holds in etcd under one lease: writes the newest value of each, and keeps
the lease alive. The owner decides whether a lost lease is replaced. Serving never waits for
this."""

from __future__ import annotations

import asyncio
import contextlib
import random

import structlog

from shared.errors import LeaseLost, StoreError
from shared.store import Store

log = structlog.get_logger()

ANSWER_MIN_S = 0.3
ANSWER_MAX_S = 3.0
ANSWER_GROWTH = 1.5
"""What is written is sent again if it has no answer after this time, which grows each time. With
etcd's leader goes what was on its way to it, and nobody says so before two seconds have passed."""
RETRY_MIN_S = 0.1
RETRY_MAX_S = 0.5
DEFERRED_WRITE_S = 0.2
KEEP_ALIVE_RETRY_S = 0.3
"""Short, because a process that comes back from an outage of etcd without a lease is suspected."""


class LeasedKeys:
    """`put` and `delete` set what etcd should hold, and return at once. A value that is replaced
    before it was written is never written. Owners that simply take a new lease after a lost one
    call `run`; others call `write`, `keep_alive` and `renew` themselves."""

    def __init__(self, store: Store, *, ttl_s: float, lease_id: int = 0) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._lease_id = lease_id
        self._values: dict[str, bytes] = {}
        self._dirty: dict[str, None] = {}  # in the order of the calls
        self._wake = asyncio.Event()
        self._recheck_requested = asyncio.Event()

    @property
    def lease_id(self) -> int:
        """The newest lease, which may be lost; 0 before the first."""
        return self._lease_id

    def put(
        self, key: str, value: bytes, *, urgent: bool = True, before_others: bool = False
    ) -> None:
        """A value that is not urgent is written DEFERRED_WRITE_S later: at a death all ranks write
        at once, and the survivors' next step needs the same CPUs. One that comes `before_others`
        waits for the write under way alone."""
        self._values[key] = value
        self._mark(key, urgent)
        if before_others:
            self._dirty = {key: None, **self._dirty}

    def delete(self, key: str, *, urgent: bool = True) -> None:
        """Deletes a key that was put here, and ignores any other."""
        if self._values.pop(key, None) is not None:
            self._mark(key, urgent)

    def rewrite(self) -> None:
        """etcd may have lost what it had taken, though it still has the lease."""
        for key in self._values:
            self._mark(key, urgent=True)

    async def run(self) -> None:
        """Takes a lease. Whenever it is lost, takes another and writes everything again. Never
        returns."""
        await self.renew()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.write())
            while True:
                await self.keep_alive()
                await self.renew()
                self.rewrite()

    async def write(self) -> None:
        """Writes what was put or deleted, oldest first, under the present lease. Never returns."""
        retry_s, answer_s = RETRY_MIN_S, ANSWER_MIN_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                if await self._write(next(iter(self._dirty)), answer_s):
                    retry_s, answer_s = RETRY_MIN_S, ANSWER_MIN_S
                else:
                    await asyncio.sleep(retry_s * random.uniform(0.5, 1.5))
                    retry_s = min(retry_s * 2, RETRY_MAX_S)
                    answer_s = min(answer_s * ANSWER_GROWTH, ANSWER_MAX_S)

    async def keep_alive(self) -> None:
        """Refreshes the lease three times per TTL, and at once after `recheck_lease`. Returns when
        etcd says that the lease is gone."""
        wait_s = self._ttl_s / 3
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._recheck_requested.wait()
            self._recheck_requested.clear()
            wait_s = self._ttl_s / 3
            try:
                await self._store.keep_alive(self._lease_id)
            except LeaseLost:
                log.warning("lease_lost", lease_id=self._lease_id)
                return
            except StoreError as error:
                log.warning("keep_alive_failed", detail=str(error))
                wait_s = min(wait_s, KEEP_ALIVE_RETRY_S)

    def recheck_lease(self) -> None:
        """The lease may be lost: `keep_alive` asks etcd now."""
        self._recheck_requested.set()

    async def renew(self) -> int:
        """Takes a new lease for all later writes, and returns its id. Retries until etcd grants
        it."""
        retry_s = RETRY_MIN_S
        while True:
            try:
                self._lease_id = await self._store.grant_lease(self._ttl_s)
                return self._lease_id
            except StoreError as error:
                log.warning("etcd_unavailable", detail=str(error))
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.5))
                retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def release(self) -> None:
        """Revokes the lease, which deletes all keys at once. Ignores a failure."""
        if self._lease_id:
            with contextlib.suppress(StoreError):
                await self._store.revoke_lease(self._lease_id)

    def _mark(self, key: str, urgent: bool) -> None:
        self._dirty.pop(key, None)
        self._dirty[key] = None
        if urgent:
            self._wake.set()
        else:
            asyncio.get_running_loop().call_later(DEFERRED_WRITE_S, self._wake.set)

    async def _write(self, key: str, answer_s: float) -> bool:
        value, lease_id = self._values.get(key), self._lease_id
        assert lease_id, "`renew` comes before `write`"
        try:
            async with asyncio.timeout(answer_s):
                if value is None:
                    await self._store.delete(key)
                else:
                    await self._store.put(key, value, lease_id=lease_id)
        except LeaseLost:
            self.recheck_lease()  # the next lease writes it again
            return False
        except (StoreError, TimeoutError) as error:
            detail = str(error) or f"no answer within {answer_s:.1f} s"
            log.warning("put_failed", key=key, detail=detail)
            return False
        if self._values.get(key) is value and self._lease_id == lease_id:
            self._dirty.pop(key, None)
        return True
