"""Turns a decision into one fenced transaction, and keeps a lease for verdicts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

import structlog

from control_plane.cluster_state import ClusterState
from control_plane.writes import (
    Assign,
    DeclareDead,
    DeleteKeys,
    PublishDesired,
    PublishMap,
    Write,
    stopped_verdicts,
)
from shared.clock import Clock
from shared.errors import LeaseLost, StoreUnavailable
from shared.keys import Keys
from shared.records import SlotContents, Verdict, pack_map, pack_record
from shared.store import Compare, Delete, Put, Snapshot, Store, WatchEvent

log = structlog.get_logger()

_VERDICT_TTL_S = 600.0
_VERDICT_LEASE_AGE_S = 60.0
_RETRY_S = (0.1, 0.5)
_PATIENCE_S = (0.5, 4.0)
"""For an answer to a write: at first, and at most. A write that a member of etcd has handed to a
leader which has just died is never answered, though another leader is there after some 0.3 s. Each
write after one without an answer waits twice as long, for etcd may only be slow."""


class Publisher:
    """`run` always has a recent lease ready, so that a verdict needs no extra round trip. A
    verdict's lease is never renewed: it expires about _VERDICT_TTL_S after the verdict."""

    def __init__(
        self, store: Store, keys: Keys, clock: Clock, patience_s: tuple[float, float] = _PATIENCE_S
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._first_patience_s, self._longest_patience_s = patience_s
        self._patience_s = self._first_patience_s
        self._verdict_lease_id = 0

    async def run(self) -> None:
        while True:
            try:
                await self.grant_verdict_lease()
                await asyncio.sleep(_VERDICT_LEASE_AGE_S)
            except StoreUnavailable:
                await asyncio.sleep(random.uniform(*_RETRY_S))

    async def grant_verdict_lease(self) -> None:
        """For the next verdicts. Raises StoreUnavailable."""
        self._verdict_lease_id = await self._store.grant_lease(_VERDICT_TTL_S)

    async def write(
        self, write: Write, leader_revision: int, state: ClusterState
    ) -> tuple[WatchEvent, ...]:
        """Returns the events that the watch will show. `state` is what was decided on. Raises
        StoreUnavailable if the outcome is unknown, and TxnConflict or LeaseLost if nothing was
        written."""
        compare = [Compare(key=self._keys.leader, mod_revision=leader_revision)]
        if isinstance(write, PublishDesired):
            desired_revision = state.revision_of(self._keys.desired)
            compare.append(Compare(key=self._keys.desired, mod_revision=desired_revision))
        elif not isinstance(write, DeleteKeys):
            map_revision = state.revision_of(self._keys.map)
            compare.append(Compare(key=self._keys.map, mod_revision=map_revision))
            compare += [self._is_stopped(v, state) for v in stopped_verdicts(write, state)]
        operations = self._operations(write)
        try:
            revision = await self._answer_in_time(self._store.txn(compare, operations))
        except LeaseLost:
            await self.grant_verdict_lease()
            raise
        return tuple(
            WatchEvent(
                key=operation.key,
                value=operation.value if isinstance(operation, Put) else None,
                mod_revision=revision,
            )
            for operation in operations
        )

    async def _answer_in_time(self, write: Awaitable[int]) -> int:
        patience_s = self._patience_s
        self._patience_s = min(2 * patience_s, self._longest_patience_s)
        try:
            async with asyncio.timeout(patience_s):
                revision = await write
        except TimeoutError as error:
            raise StoreUnavailable(f"etcd has not answered within {patience_s:g} s") from error
        self._patience_s = self._first_patience_s
        return revision

    async def reread(self) -> Snapshot:
        """What etcd holds, after a write that failed. Retries until etcd answers."""
        while True:
            try:
                return await self._store.get_prefix(self._keys.root)
            except StoreUnavailable as error:
                log.warning("etcd_unavailable", doing="reread", error=str(error))
                await asyncio.sleep(random.uniform(*_RETRY_S))

    def _is_stopped(self, verdict: Verdict, state: ClusterState) -> Compare:
        """Its node agent has not said otherwise: a process that goes on in this moment lives."""
        key = self._keys.view(verdict.rank, verdict.incarnation)
        return Compare(key=key, mod_revision=state.revision_of(key))

    def _operations(self, write: Write) -> list[Put | Delete]:
        match write:
            case PublishMap():
                published = Put(key=self._keys.map, value=pack_map(write.expert_map))
                verdicts = self._verdict_puts(write.verdicts)
                return [published, *verdicts, *self._assignment_puts(write.assignments)]
            case DeclareDead():
                return self._verdict_puts(write.verdicts)
            case Assign():
                return [
                    *self._verdict_puts(write.verdicts),
                    *self._assignment_puts(write.assignments),
                ]
            case PublishDesired():
                return [Put(key=self._keys.desired, value=pack_record(write.desired))]
            case DeleteKeys():
                return [Delete(key=key) for key in write.keys]

    def _verdict_puts(self, verdicts: tuple[Verdict, ...]) -> list[Put | Delete]:
        return [
            Put(
                key=self._keys.verdict(v.rank, v.incarnation),
                value=pack_record(v),
                lease_id=self._verdict_lease_id,
            )
            for v in verdicts
        ]

    def _assignment_puts(self, assignments: tuple[SlotContents, ...]) -> list[Put | Delete]:
        return [
            Put(key=self._keys.assignment(a.rank, a.incarnation), value=pack_record(a))
            for a in assignments
        ]
