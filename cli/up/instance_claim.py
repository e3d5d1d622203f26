"""Which `starfish up` runs an instance: a key in etcd that only one can hold. A second one with the
same name on the same etcd is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from shared.clock import Clock
from shared.errors import ConfigError, LeaseLost, StoreError, TxnConflict, WireError
from shared.keys import Keys
from shared.records import OwnerRecord, pack_record, unpack_record
from shared.store import Compare, KeyValue, Put, Store

_TTL_S = 10.0
_RETRY_S = 0.5


def owner_record(clock: Clock, url: str) -> OwnerRecord:
    """This process, under a name that no other run has."""
    pid = os.getpid()
    return OwnerRecord(
        run=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        pid_namespace=_pid_namespace(),
        started_ticks=_started_ticks(pid) or 0,
        url=url,
        since=clock.wall(),
    )


class InstanceClaim:
    """`take` it, then keep it while `held`, then `release` it. A claim that is lost while etcd is
    away is taken again, and serving never stops for it."""

    def __init__(
        self, store: Store, keys: Keys, record: OwnerRecord, warn: Callable[[str], None]
    ) -> None:
        self._store = store
        self._keys = keys
        self._record = record
        self._warn = warn
        self._lease_id = 0

    async def take(self) -> None:
        """Raises ConfigError if another `starfish up` has the instance, and StoreUnavailable."""
        while True:
            holder = await self._put_if_absent()
            if holder is None:
                return
            record = _decode(holder)
            if record is None or not _is_dead(record):
                await self.release()
                raise ConfigError(self._refusal(record))
            await self._store.revoke_lease(holder.lease_id)

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            holding = tasks.create_task(self._hold())
            try:
                yield
            finally:
                holding.cancel()

    async def release(self) -> None:
        """Ignores a failure: the lease expires by itself."""
        lease_id, self._lease_id = self._lease_id, 0
        if lease_id:
            with contextlib.suppress(StoreError):
                await self._store.revoke_lease(lease_id)

    async def _put_if_absent(self) -> KeyValue | None:
        """Whoever has the key instead."""
        if not self._lease_id:
            self._lease_id = await self._store.grant_lease(_TTL_S)
        key, value = self._keys.owner, pack_record(self._record)
        while True:
            with contextlib.suppress(TxnConflict):
                await self._store.txn(
                    [Compare(key=key, mod_revision=0)],
                    [Put(key=key, value=value, lease_id=self._lease_id)],
                )
                return None
            holder = await self._store.get(key)
            if holder is not None:
                is_ours = holder.lease_id == self._lease_id  # the reply was lost
                return None if is_ours else holder

    async def _hold(self) -> None:
        """Never returns."""
        has_warned = False
        while True:
            await asyncio.sleep(_TTL_S / 3 if self._lease_id else _RETRY_S)
            try:
                if self._lease_id:
                    await self._store.keep_alive(self._lease_id)
                    continue
                holder = await self._put_if_absent()
                if holder is not None and not has_warned:
                    has_warned = True
                    self._warn(self._refusal(_decode(holder)))
                if holder is not None:
                    await self.release()
            except LeaseLost:
                self._lease_id = 0
            except StoreError:
                continue

    def _refusal(self, holder: OwnerRecord | None) -> str:
        who = "by another `starfish up`"
        if holder is not None:
            who = f"by pid {holder.pid} on {holder.host} ({holder.url})"
        return (
            f"instance {self._keys.instance!r} is already running {who} with this etcd; stop it "
            f"with Ctrl-C (a killed one is forgotten after {_TTL_S:.0f} s), or pass another "
            "--instance and --port"
        )


def _decode(holder: KeyValue) -> OwnerRecord | None:
    try:
        return unpack_record(holder.value, OwnerRecord)
    except WireError:
        return None


def _is_dead(holder: OwnerRecord) -> bool:
    """Only if this host's own processes prove it."""
    if (holder.host, holder.pid_namespace) != (socket.gethostname(), _pid_namespace()):
        return False
    return _started_ticks(holder.pid) != holder.started_ticks


def _pid_namespace() -> str:
    """Within it a pid means a process, until the next boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since the boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
