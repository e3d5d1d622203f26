"""`shared.store.Store` on a real etcd: combines the single calls and the watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from shared.errors import StoreError, StoreUnavailable
from shared.etcd_client import EtcdClient
from shared.etcd_health import EtcdHealth
from shared.etcd_options import EtcdOptions
from shared.etcd_watch import EtcdWatch
from shared.store import Compare, Delete, KeyValue, Put, Snapshot, WatchEvent

_JOIN_TIMEOUT_S = 2.0
_RETRY_S = 0.2


async def connect_store(options: EtcdOptions, *, timeout_s: float = 2.0) -> EtcdStore:
    """A store whose etcd has answered once. Raises ConfigError for impossible options, StoreError
    if etcd does not know who we are, and StoreUnavailable if none answers within `timeout_s`."""
    store = EtcdStore(options, timeout_s)
    try:
        await _until_answered(store, asyncio.get_running_loop().time() + timeout_s)
    except StoreUnavailable as error:
        await store.close()
        hint = "" if options.etcd_ca else "; if it uses TLS, pass --etcd-ca"
        raise StoreUnavailable(
            f"no etcd answers at {options.etcd}; start one there, or pass the right address with "
            f"--etcd HOST:PORT{hint}"
        ) from error
    except StoreError:
        await store.close()
        raise
    return store


async def _until_answered(store: EtcdStore, deadline: float) -> None:
    """A member that has just lost its leader refuses at once: soon there is another one."""
    while True:
        try:
            return await store.check()
        except StoreUnavailable:
            if asyncio.get_running_loop().time() + _RETRY_S >= deadline:
                raise
        await asyncio.sleep(_RETRY_S)


class EtcdStore:
    """See `Store`. One gRPC channel, and a daemon thread per open watch."""

    def __init__(self, options: EtcdOptions, timeout_s: float = 2.0) -> None:
        """Raises ConfigError."""
        self._client = EtcdClient(options, timeout_s)
        self._watches: set[EtcdWatch] = set()

    async def health(self) -> EtcdHealth:
        """Raises StoreError."""
        return await self._client.health()

    async def check(self) -> None:
        """Returns if etcd answers and knows us. Raises StoreError."""
        await self._client.check()

    async def get(self, key: str) -> KeyValue | None:
        return await self._client.get(key)

    async def get_prefix(self, prefix: str) -> Snapshot:
        return await self._client.get_prefix(prefix)

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        return await self._client.put(key, value, lease_id)

    async def delete(self, key: str) -> bool:
        return await self._client.delete(key)

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put | Delete]) -> int:
        return await self._client.txn(compare, then)

    async def grant_lease(self, ttl_s: float) -> int:
        """etcd counts whole seconds: `ttl_s` is rounded up."""
        return await self._client.grant_lease(ttl_s)

    async def keep_alive(self, lease_id: int) -> float:
        return await self._client.keep_alive(lease_id)

    async def revoke_lease(self, lease_id: int) -> None:
        await self._client.revoke_lease(lease_id)

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot | WatchEvent, None]:
        watch = EtcdWatch(self._client, prefix)
        self._watches.add(watch)
        try:
            while (batch := await watch.take()) is not None:
                for item in batch:
                    yield item
        finally:
            watch.stop()
            self._watches.discard(watch)

    async def close(self) -> None:
        """Ends every watch as well."""
        watches = list(self._watches)
        for watch in watches:
            watch.stop()
        self._client.close()
        for watch in watches:
            await asyncio.to_thread(watch.join, _JOIN_TIMEOUT_S)
